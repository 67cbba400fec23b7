"""The scripts on a CUDA device: pytest -m gpu"""

import pytest
import torch
from ranks import ROOT, run_ranks, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def run(tiny_backbone, news_folder, tmp_path):
    """Runs train_single.py where world_size is 0, else train_ddp.py; returns rank 0."""

    def run(world_size, *flags, **extra):
        common = ["--model", tiny_backbone, "--data", news_folder, "--checkpoint-dir", tmp_path]
        common += ["--lr", "5e-3", "--global-batch-size", 8, "--max-eval-samples", 20, *flags]
        return train(world_size, common, tmp_path, CUBLAS_WORKSPACE_CONFIG=":4096:8", **extra)[0]

    return run


@pytest.mark.parametrize("world_size", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "auto"])
def test_the_loss_falls_in_every_precision(run, precision, world_size):
    record = run(world_size, "--precision", precision, "--epochs", 3).record
    assert record["device"] == "cuda" and record["peak_memory_mb"] > 0
    assert record["backend"] == ("cpu:gloo,cuda:nccl" if world_size else None)
    assert record["epochs"][-1]["train_loss"] < record["epochs"][0]["train_loss"]


def test_two_ranks_share_a_card_over_gloo(run):
    record = run(2, "--backend", "gloo", "--epochs", 2).record
    assert (record["world_size"], record["backend"], record["device"]) == (2, "gloo", "cuda")
    assert record["epochs"][1]["train_loss"] < record["epochs"][0]["train_loss"]


def test_more_processes_than_gpus_is_one_line(tmp_path):
    gpus = torch.cuda.device_count()
    script = [ROOT / "training" / "train_ddp.py"]
    ranks = run_ranks(gpus + 1, script, tmp_path, TORCHELASTIC_RUN_ID="a run")
    assert f"error: {gpus + 1} processes, but {gpus} GPU" in ranks[0].stderr
    assert {rank.status for rank in ranks} == {1} and ranks[0].stderr.count("\n") == 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_stopped_run_resumes(run, precision):
    flags = ("--precision", precision, "--epochs", 2)
    run(0, *flags, status=143, STOP_AT_STEP="5")
    assert run(0, *flags).record["resumed_at"] == [5]
