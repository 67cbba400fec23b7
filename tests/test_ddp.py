"""What DDP promises, on real processes over gloo: pytest tests/test_ddp.py"""

import argparse
import re

import numpy as np
import pytest
import torch
from ranks import ROOT, losses, run_ranks, train

import rank_checks
import utils
from inference.model_loader import Classifier
from model import Config, NewsClassifier


@pytest.fixture(scope="module")
def two_ranks(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    return train(2, flags(folder / "c", "--lr", "5e-3"), folder), folder


def test_ranks_end_with_the_same_bits(two_ranks):
    (zero, one), _ = two_ranks
    assert all(map(torch.equal, zero.seen["weights"], one.seen["weights"]))


def test_only_rank_0_prints_and_writes(two_ranks):
    (zero, one), folder = two_ranks
    assert "epoch 2" in zero.stdout and "samples_per_second" in zero.stderr
    assert len(re.findall(r"^communication: \d+% of a step's", zero.stdout, re.MULTILINE)) == 1
    assert (one.stdout, one.stderr) == ("", "")
    assert {path.name for path in (folder / "c").iterdir()} == {"distilbert_agnews.pt", "tokenizer"}
    assert len(list((folder / "runs").iterdir())) == 1


def test_the_checkpoint_reads_back_without_a_process_group(two_ranks):
    (zero, _), folder = two_ranks
    state = torch.load(folder / "c" / "distilbert_agnews.pt")
    assert not [name for name in state["model"] if name.startswith("module.")]
    trained = NewsClassifier(Config(**state["config"])).eval()
    for parameter, weight in zip(trained.parameters(), zero.seen["weights"], strict=True):
        parameter.data = weight
    ids = torch.randint(5, 50, (3, 9))
    with torch.inference_mode():
        expected = trained(ids, torch.ones_like(ids)).numpy()
    found = Classifier(folder / "c", "torch").engine.logits(ids.numpy(), np.ones_like(ids))
    assert np.array_equal(found, expected)


def test_the_run_record_tells_what_ran_and_how_the_loss_fell(two_ranks):
    (zero, _), _ = two_ranks
    record = zero.record
    assert (record["script"], record["world_size"], record["backend"]) == ("train_ddp", 2, "gloo")
    assert record["global_batch_size"] == 8 and record["micro_batch_size"] == 4
    assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2]
    assert record["epochs"][0]["seconds"] > 0 and record["test_samples"] == 20
    assert record["epochs"][1]["train_loss"] < record["epochs"][0]["train_loss"]
    assert [point["step"] for point in record["curve"]] == [*range(1, 29)]
    assert np.mean(losses(zero)[:14]) == pytest.approx(record["epochs"][0]["train_loss"])


def test_compression_and_sparse_embeddings_train_alike(calm_backbone, flags, tmp_path):
    run = flags(tmp_path / "c", "--model", calm_backbone, "--max-steps", 6, "--fresh")
    plain, _ = train(2, run, tmp_path)
    small, other = train(2, [*run, "--sparse-embeddings", "--grad-compression", "bf16"], tmp_path)
    assert losses(small) == pytest.approx(losses(plain), rel=1e-2)
    assert losses(small) != losses(plain)
    assert all(map(torch.equal, small.seen["weights"], other.seen["weights"]))


@pytest.mark.parametrize("what", ["the data or --max-*-samples", "--model", "--lr", "--save-every"])
def test_ranks_that_hold_something_else_are_found_before_the_first_step(
    calm_backbone, flags, tmp_path, what
):
    other = {
        "the data or --max-*-samples": ["--max-eval-samples", "19"],  # only the test rows differ
        "--model": ["--model", str(calm_backbone)],
        "--lr": ["--lr", "1e-3"],
        "--save-every": ["--save-every", "2"],
    }[what]
    argv = [ROOT / "training" / "train_ddp.py", *flags(tmp_path / "c", "--max-steps", 2)]
    ranks = run_ranks(2, argv, tmp_path, more_for_rank_1=other)
    assert [rank.status for rank in ranks] == [1, 1]
    assert ranks[0].stderr.startswith(f"error: {what} differs: ")
    assert "rank 1" in ranks[0].stderr and ranks[0].stderr.count("\n") == 1
    assert not (tmp_path / "c" / "distilbert_agnews.pt").exists()


def test_a_host_with_other_code_is_named(monkeypatch):
    def gather(everyone: list, own: dict) -> None:
        everyone[:] = [own, own | {"the code": "of yesterday", "host": "b"}]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    args = argparse.Namespace(save_every=1, sparse_embeddings=False, backend="auto")
    with pytest.raises(utils.UsageError, match="^the code differs: of yesterday on rank 1"):
        rank_checks.check_same_on_all_ranks(args, {}, "model, data")
