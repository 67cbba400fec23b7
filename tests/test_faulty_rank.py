"""One rank fails, and all end with its cause in the last line: pytest tests/test_faulty_rank.py"""

import sys

import pytest
import torch
from ranks import ROOT, run

import errors
import rank_checks
import utils


@pytest.mark.parametrize(
    "fault, last",
    [
        ("exception", "KeyError: 'a bug on one rank'"),
        ("nan", "error: grad_norm is nan at step 3; start over with a lower --lr"),
        ("memory", "error: out of memory; use a smaller --micro-batch-size"),
        ("hang at start", "error: the first all-reduce did not end within 10 s; on GPUs try NCCL_"),
        pytest.param(
            "hang",
            "error: another rank did not reach a collective within 10 s: it hangs, or ",
            marks=pytest.mark.slow,
        ),
        ("killed", "error: rank 1 was killed by SIGKILL"),
        (
            "aborted",
            "error: rank 1 was killed by SIGABRT (by NCCL, if another rank kept it waiting ",
        ),
        ("killed, seen late", "error: rank 1 was killed by SIGKILL"),
        ("exception, seen late", "KeyError: 'a bug on one rank'"),
    ],
)
def test_the_first_cause_is_shown_last(flags, tmp_path, fault, last):
    check_last_line(flags(tmp_path / "c"), tmp_path, fault, last)


def check_last_line(flags, folder, fault, last, seconds=80, **extra):
    launch = [ROOT / "training" / "torchrun.py", "--standalone", "--nproc-per-node", 2]
    script = [ROOT / "tests" / "instrument.py", folder, ROOT / "training" / "train_ddp.py"]
    env = {"FAULT": fault, "TIMEOUT": "10", "GLOO_SOCKET_IFNAME": "lo"} | extra
    # the start, the time-out, and the 30 s that torchrun gives a rank which does not end
    done = run([sys.executable, *launch, *script, *flags], folder, seconds, **env)
    assert done.returncode not in (0, None)
    assert last in done.stderr.strip().splitlines()[-1], done.stderr
    assert "another process exited" not in done.stderr
    assert done.stderr.count("error: ") <= 1


@pytest.mark.parametrize(
    "text, line, caused_elsewhere",
    [
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled cuda error, NCCL version 2.27.5\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
            "Cuda failure 'invalid argument'",
            "NCCL failed (Cuda failure 'invalid argument'); on GPUs try NCCL_CUMEM_HOST_ENABLE=0, ",
            False,
        ),
        (
            "[enforce fail at gloo/transport/tcp/device.cc:84] Unable to find address for: eth9",
            "GLOO_SOCKET_IFNAME=eth9: this host has no such interface",
            False,
        ),
        (
            "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process "
            "exiting prematurely.",
            "another process exited; ",
            True,
        ),
        ("[/gloo/transport/tcp/pair.cc] Connection closed by peer", "another process exited", True),
    ],
)
def test_an_error_of_nccl_is_told_apart_from_a_process_that_is_gone(text, line, caused_elsewhere):
    said, elsewhere = errors.explain(torch.distributed.DistBackendError(text), ())
    assert said.startswith(line) and elsewhere == caused_elsewhere


@pytest.mark.parametrize(
    "text, line",
    [
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", "out of memory; use"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`", "out of memory; use"),
        ("CUDA error: no kernel image is available for execution on the device", "this torch has"),
        ("The NVIDIA driver on your system is too old (found 12040).\nPlease", "The NVIDIA driver"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nx", "CUDA error"),
    ],
)
def test_what_a_gpu_lacks_is_one_line(text, line):
    said, elsewhere = errors.explain(torch.AcceleratorError(text), ())
    assert said.startswith(line) and not elsewhere


@pytest.mark.parametrize(
    "kind, text",
    [
        ("DistStoreError", "wait timeout after 90000ms, keys: /x"),
        ("DistNetworkError", "The client socket has timed out after 600000ms"),
    ],
)
def test_a_store_that_nobody_fills_is_another_rank_that_is_missing(kind, text):
    said, elsewhere = errors.explain(getattr(torch.distributed, kind)(text), ())
    assert said.startswith("another rank did not reach") and elsewhere


def test_a_host_whose_gpu_cannot_be_seen_is_named(monkeypatch):
    monkeypatch.setattr(rank_checks, "all_reduce_sum", lambda values: [1.0])
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(utils.UsageError, match="1 of 2 ranks have a GPU, host .* sees none"):
        rank_checks.check_devices(torch.device("cpu"))
