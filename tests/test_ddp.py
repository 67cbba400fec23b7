"""What DDP promises, on real processes over gloo: pytest tests/test_ddp.py"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from ranks import ROOT, environment, observe, run_ranks
from torch.nn import functional as F

import dataset
import gradients
import utils
from inference.model_loader import Classifier
from model import Config, NewsClassifier, load_backbone


def flags(backbone, news, folder, *more):
    common = ["--model", backbone, "--data", news, "--checkpoint-dir", folder]
    return [*common, "--precision", "fp32", "--max-eval-samples", "20", *map(str, more)]


def relative_error(grads, expected):
    difference = sum((g - e).double().square().sum() for g, e in zip(grads, expected, strict=True))
    return float((difference / sum(e.double().square().sum() for e in expected)).sqrt())


def whole_batch_gradient(backbone, news, rows, seed=0):
    """The gradient of the mean loss over `rows` rows in one batch, by transformers' own model."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    data = dataset.prepare_data(str(news), backbone, 128, rows, 20)
    torch.manual_seed(seed)
    ours = load_backbone(backbone)
    config = DistilBertConfig.from_pretrained(backbone, num_labels=4)
    model = DistilBertForSequenceClassification(config)
    model.load_state_dict(ours.state_dict())
    model.train()  # the backbone's dropouts are 0
    input_ids, mask, labels = dataset.collate([data.train[i] for i in range(rows)])
    F.cross_entropy(model(input_ids, mask).logits, labels).backward()
    theirs = dict(model.named_parameters())
    return [theirs[name].grad for name, _ in ours.named_parameters()]


# One step holds all training rows, so every split of it is the same batch. 22 rows of 24: the step
# is not full, and shares are uneven: 11 + 11, or 8 + 7 + 7.
@pytest.mark.parametrize(
    "world_size, rows, micro",
    [(0, 24, 24), (2, 24, 12), (2, 24, 6), (2, 22, 6), (3, 24, 8), (3, 22, 8), (3, 22, 4)],
)
def test_gradients_equal_those_of_one_process_on_the_whole_batch(
    calm_backbone, news_folder, tmp_path, world_size, rows, micro
):
    run = flags(calm_backbone, news_folder, tmp_path / "c", "--max-train-samples", rows)
    run += ["--epochs", "1", "--global-batch-size", "24", "--micro-batch-size", str(micro)]
    ranks = observe(world_size, run, tmp_path)
    expected = whole_batch_gradient(calm_backbone, news_folder, rows)
    for rank in ranks:
        assert relative_error(rank.seen["grads"][0], expected) < 1e-6


def test_accumulation_all_reduces_once_a_step(tiny_backbone, news_folder, tmp_path):
    run = flags(tiny_backbone, news_folder, tmp_path / "c", "--epochs", 1, "--max-steps", 3)
    (whole, _), (parts, _) = (
        observe(2, [*run, "--global-batch-size", "24", "--micro-batch-size", micro], tmp_path)
        for micro in ("12", "3")
    )
    assert len(parts.seen["buckets"]) == 3
    assert parts.seen["buckets"] == whole.seen["buckets"]  # not four times as many


@pytest.fixture(scope="module")
def two_ranks(tiny_backbone, news_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    run = flags(tiny_backbone, news_folder, folder / "c", "--epochs", 2, "--global-batch-size", 8)
    return observe(2, [*run, "--lr", "5e-3"], folder), folder


def test_ranks_end_with_the_same_bits(two_ranks):
    (zero, one), _ = two_ranks
    for mine, other in zip(zero.seen["weights"], one.seen["weights"], strict=True):
        assert torch.equal(mine, other)


def test_ranks_see_disjoint_rows_whose_union_is_the_epoch(two_ranks, tiny_backbone, news_folder):
    (zero, one), _ = two_ranks
    n = len(dataset.prepare_data(str(news_folder), tiny_backbone, 128, None, None).train)
    for epoch in range(2):
        seen = [rank.seen["rows"][epoch] for rank in (zero, one)]
        shares = [{i for rows in steps for i in rows if i >= 0} for steps in seen]
        assert shares[0].isdisjoint(shares[1])
        assert shares[0] | shares[1] == set(range(n))


def test_the_order_differs_between_epochs(two_ranks):
    (zero, _), _ = two_ranks
    assert zero.seen["rows"][0] != zero.seen["rows"][1]


def test_without_set_epoch_every_epoch_has_the_same_order(tiny_backbone, news_folder, tmp_path):
    run = flags(tiny_backbone, news_folder, tmp_path / "c", "--epochs", 2, "--global-batch-size", 8)
    zero, _ = observe(2, run, tmp_path, NO_SET_EPOCH="1")
    assert zero.seen["rows"][0] == zero.seen["rows"][1]


def test_dropout_masks_differ_between_ranks_and_come_again_for_the_same_step():
    def draw(*place):
        utils.seed_step(0, *place)
        return torch.rand(100)

    assert not torch.equal(draw(0, 0, 0), draw(0, 0, 1))  # epoch, step, rank
    assert not torch.equal(draw(0, 0, 0), draw(0, 1, 0))
    assert torch.equal(draw(1, 2, 1), draw(1, 2, 1))


def test_only_rank_0_prints_and_writes(two_ranks):
    (zero, one), folder = two_ranks
    assert "epoch 2" in zero.stdout and "samples/s" in zero.stderr
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


def test_the_run_record_tells_what_ran(two_ranks):
    _, folder = two_ranks
    record = json.loads(next((folder / "runs").iterdir()).read_text())
    assert (record["script"], record["world_size"], record["backend"]) == ("train_ddp", 2, "gloo")
    assert record["global_batch_size"] == 8 and record["micro_batch_size"] == 4
    assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2]
    assert record["epochs"][0]["seconds"] > 0 and record["test_samples"] == 20


def test_the_loss_decreases_over_epochs(two_ranks):
    _, folder = two_ranks
    record = json.loads(next((folder / "runs").iterdir()).read_text())
    assert record["epochs"][1]["train_loss"] < record["epochs"][0]["train_loss"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_is_exact_at_any_world_size(
    tiny_backbone, news_folder, tmp_path, world_size
):
    # 53 test rows: neither 2, 3 nor 7 divides them
    worker = ROOT / "tests" / "evaluate_rank.py"
    ranks = run_ranks(world_size, [worker, tiny_backbone, news_folder], tmp_path)
    assert all(rank.status == 0 for rank in ranks), [rank.stderr for rank in ranks]
    answers = [json.loads(rank.stdout) for rank in ranks]
    data = dataset.prepare_data(str(news_folder), tiny_backbone, 128, None, None)
    torch.manual_seed(0)
    model = load_backbone(tiny_backbone).eval()
    correct = 0
    for i in range(len(data.test)):  # one by one: no batches, no ranks
        input_ids, mask, labels = dataset.collate([data.test[i]])
        correct += int(model(input_ids, mask).argmax() == labels)
    assert len(data.test) == 53
    for answer in answers:
        assert round(answer["accuracy"] * 53, 6) == correct


@pytest.mark.parametrize("world_size, micro", [(2, 12), (2, 6), (3, 8)])
def test_sparse_embeddings_change_no_gradient(
    calm_backbone, news_folder, tmp_path, world_size, micro
):
    run = flags(calm_backbone, news_folder, tmp_path / "c", "--max-train-samples", 24)
    run += ["--epochs", "3", "--global-batch-size", "24", "--micro-batch-size", str(micro)]
    ranks = observe(world_size, [*run, "--sparse-embeddings"], tmp_path)
    expected = whole_batch_gradient(calm_backbone, news_folder, 24)
    for rank in ranks:
        assert relative_error(rank.seen["grads"][0], expected) < 1e-6
        for mine, other in zip(rank.seen["weights"], ranks[0].seen["weights"], strict=True):
            assert torch.equal(mine, other)


def test_sparse_embeddings_send_only_the_rows_that_were_touched(monkeypatch):
    sent = []

    def gather(everyone, mine):
        sent.append(mine.shape)
        everyone[0].copy_(mine)

    monkeypatch.setattr(gradients.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(gradients.dist, "all_reduce", lambda tensor, op: None)
    monkeypatch.setattr(gradients.dist, "all_gather", gather)
    gradient = torch.zeros(1000, 8)
    gradient[[3, 700]] = torch.randn(2, 8)
    before = gradient.clone()
    gradients.average_rows(gradient, torch.float32)
    assert sent == [(2,), (2, 8)]  # their numbers, then themselves
    assert torch.equal(gradient, before)


def test_gradient_compression_changes_little(calm_backbone, news_folder, tmp_path):
    losses = []
    for kind in ("none", "bf16", "fp16"):
        more = ["--sparse-embeddings"] if kind == "fp16" else []  # the two go together
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node", "2", ROOT / "training" / "train_ddp.py",
                   *flags(calm_backbone, news_folder, tmp_path / kind, "--epochs", 1,
                          "--max-steps", 4, "--grad-compression", kind, *more)]  # fmt: skip
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment(),
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        state = torch.load(tmp_path / kind / "distilbert_agnews.pt")["model"]
        losses.append(torch.cat([value.flatten() for value in state.values()]))
    for other in losses[1:]:
        assert 0 < (losses[0] - other).norm() / losses[0].norm() < 0.01
