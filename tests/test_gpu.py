"""The scripts on a CUDA device: pytest -m gpu"""

import json
import subprocess
import sys

import pytest
import torch
from ranks import ROOT, environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(folder, backbone, news, *flags, processes=0):
    """Runs train_single.py, or train_ddp.py with `processes` ranks; returns (output, record)."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    script = ROOT / "training" / ("train_ddp.py" if processes else "train_single.py")
    report = folder / "report.json"
    common = f"--model {backbone} --data {news} --checkpoint-dir {folder} --report {report} "
    common += "--lr 5e-3 --global-batch-size 8 --max-eval-samples 20"
    command = [sys.executable, *(launch if processes else []), script, *common.split(), *flags]
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done, json.loads(report.read_text()) if report.exists() else None


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "auto"])
def test_the_loss_falls_in_every_precision(
    tiny_backbone, news_folder, tmp_path, precision, processes
):
    flags = ("--precision", precision, "--epochs", 3)
    done, record = train(tmp_path, tiny_backbone, news_folder, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    assert record["device"] == "cuda"
    assert record["backend"] == ("cpu:gloo,cuda:nccl" if processes else None)
    assert record["epochs"][-1]["train_loss"] < record["epochs"][0]["train_loss"]
    assert record["peak_memory_mb"] > 0


def test_two_ranks_share_a_card_over_gloo(tiny_backbone, news_folder, tmp_path):
    flags = ("--backend", "gloo", "--epochs", 2)
    done, record = train(tmp_path, tiny_backbone, news_folder, *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert (record["world_size"], record["backend"], record["device"]) == (2, "gloo", "cuda")
    assert record["epochs"][1]["train_loss"] < record["epochs"][0]["train_loss"]


def test_more_processes_than_gpus_is_one_line(tiny_backbone, news_folder, tmp_path):
    more = torch.cuda.device_count() + 1
    done, _ = train(tmp_path, tiny_backbone, news_folder, processes=more)
    assert done.returncode != 0
    assert f"error: {more} processes, but {more - 1} GPU" in done.stderr


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_stopped_run_resumes(tiny_backbone, news_folder, tmp_path, precision):
    instrument = [sys.executable, ROOT / "tests" / "instrument.py", tmp_path]
    command = [
        *instrument,
        ROOT / "training" / "train_single.py",
        "--model",
        tiny_backbone,
        "--data",
        news_folder,
        "--checkpoint-dir",
        tmp_path,
        "--precision",
        precision,
        "--global-batch-size",
        8,
        "--max-eval-samples",
        20,
        "--epochs",
        2,
    ]
    env = environment(STOP_AT_STEP="5", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 143, done.stderr
    flags = ("--precision", precision, "--epochs", 2)
    done, record = train(tmp_path, tiny_backbone, news_folder, *flags)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    assert record["resumed_at"] == [5]
