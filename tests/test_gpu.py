"""The scripts on one CUDA device: pytest -m gpu"""

import json
import time

import pytest
import torch
from ranks import train
from test_faulty_rank import check_last_line

from model import Config, NewsClassifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CARD = {"CUDA_VISIBLE_DEVICES": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@pytest.fixture
def run(flags, tmp_path):
    """Runs train_single.py where world_size is 0, else train_ddp.py; returns rank 0."""

    def run(world_size, *more, folder=tmp_path, **extra):
        return train(world_size, flags(folder, "--lr", "5e-3", *more), tmp_path, **CARD, **extra)[0]

    return run


@pytest.mark.parametrize("world_size", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "auto"])
def test_the_loss_falls_in_every_precision(run, precision, world_size):
    record = run(world_size, "--precision", precision, "--epochs", 3).record
    assert record["device"] == "cuda" and record["peak_memory_mb"] > 0
    assert record["backend"] == ("cpu:gloo,cuda:nccl" if world_size else None)
    assert record["epochs"][-1]["train_loss"] < record["epochs"][0]["train_loss"]


def test_a_batch_of_a_new_length_takes_no_longer_than_one_of_a_known_length():
    model = NewsClassifier(Config(vocab_size=100)).cuda()

    def seconds(lengths) -> float:
        t0 = time.perf_counter()
        for length in lengths:
            tokens = torch.ones(8, length, dtype=torch.long, device="cuda")
            with torch.autocast("cuda", torch.bfloat16):
                model(tokens, tokens).sum().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - t0

    seconds([30])  # loads CUDA's libraries
    assert seconds(range(40, 70)) < 4 * seconds(range(40, 70))


def test_two_ranks_share_a_card_over_gloo(run):
    record = run(2, "--backend", "gloo", "--epochs", 2).record
    assert (record["world_size"], record["backend"], record["device"]) == (2, "gloo", "cuda")
    assert record["epochs"][1]["train_loss"] < record["epochs"][0]["train_loss"]


@pytest.mark.parametrize("micro_batch_size", [2, 4])
@pytest.mark.parametrize("sparse", [[], ["--sparse-embeddings"]])
@pytest.mark.parametrize("compression", ["none", "fp16"])
def test_two_nccl_ranks_train_as_one_process_does(
    run, calm_backbone, compression, sparse, micro_batch_size
):
    same = ["--model", calm_backbone, "--precision", "fp32", "--max-steps", 10]
    one = run(0, *same)
    flags = ["--fresh", "--grad-compression", compression, *sparse]
    two = run(2, *same, *flags, "--micro-batch-size", micro_batch_size)
    tolerance = 1e-5 if compression == "none" else 1e-2
    for first, second in zip(one.seen["grads"][:3], two.seen["grads"][:3], strict=True):
        whole = torch.cat([gradient.flatten() for gradient in first])
        found = torch.cat([gradient.flatten() for gradient in second])
        assert (found - whole).norm() <= tolerance * whole.norm()
    losses = [rank.record["epochs"][0]["train_loss"] for rank in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=10 * tolerance)


@pytest.mark.parametrize("world_size", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_stopped_run_resumes_as_if_it_had_not_been(run, tmp_path, precision, world_size):
    flags = ("--precision", precision, "--epochs", 2)
    whole = run(world_size, *flags, folder=tmp_path / "whole")
    run(world_size, *flags, status=143, STOP_AT_STEP="5")
    resumed = run(world_size, *flags)
    assert resumed.record["resumed_at"] and len(resumed.record["epochs"]) == 2
    for before, after in zip(whole.seen["weights"], resumed.seen["weights"], strict=True):
        assert torch.equal(before, after)


def test_a_trace_has_the_buckets_beside_backward(run, tmp_path):
    run(2, "--max-steps", 15, "--profile", tmp_path / "traces")
    for rank in range(2):
        trace = json.loads((tmp_path / "traces" / f"rank{rank}.json").read_text())
        found = [e for e in trace["traceEvents"] if e.get("cat") == "distrinews"]
        compute = [e["name"] for e in sorted(found, key=lambda e: e["ts"]) if e["tid"] == "compute"]
        assert compute == 3 * ["data", "forward", "backward", "clip", "optimizer"]
        sent = [e["name"] for e in found if e["tid"] == "communication"]
        assert sum(name.startswith("bucket 0: AllReduce") for name in sent) == 3, sent


@pytest.mark.parametrize(
    "fault, last",
    [
        ("exception", "KeyError: 'a bug on one rank'"),
        ("memory", "error: out of memory; use a smaller --micro-batch-size"),
        ("hang at start", "error: the first all-reduce did not end within 10 s; on GPUs try NCCL_"),
        ("hang", "error: rank 0 was killed by SIGABRT (by NCCL, if another rank kept it waiting "),
        ("killed", "error: rank 1 was killed by SIGKILL"),
    ],
)
def test_a_rank_of_nccl_fails(flags, tmp_path, fault, last):
    nccl = CARD | {"ONE_CARD": "1", "NCCL_SOCKET_IFNAME": "lo"}
    # NCCL's watchdog waits 15 s more than the time-out, and a GPU makes the start slow
    check_last_line(flags(tmp_path / "c"), tmp_path, fault, last, seconds=200, **nccl)
