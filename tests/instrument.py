"""One rank of a real training script, instrumented: python tests/instrument.py OUT SCRIPT [flags]

Runs the script's own main() and saves to OUT/rank<r>.pt what no command line shows: each step's
gradients as the optimizer gets them, and the final weights. The environment can change this much:
STOP_AT_STEP=n sends this process SIGTERM in its n-th step, FAULT=... makes rank 1 fail in its 3rd,
ONE_CARD=1 has the NCCL ranks of torchrun share a GPU: it takes them for ranks of several hosts.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import ag_news
import checkpoint
import dataset
import errors
import model
import rank_checks
import utils

seen, parameters = {"grads": []}, []


def fail(fault: str) -> None:
    """What can befall a rank in the middle of a step."""
    if fault == "exception":
        raise KeyError("a bug on one rank")
    if fault == "nan":
        parameters[0].grad.fill_(float("nan"))
    if fault == "memory":
        torch.empty(10**15, device=parameters[0].device)
    if fault == "hang":
        time.sleep(1000)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "aborted":  # what NCCL's watchdog does
        os.abort()


def instrument_gradients(clip):
    def instrumented(params, limit):
        global parameters
        parameters = list(params)
        seen["grads"].append([p.grad.clone() for p in parameters])
        if len(seen["grads"]) == int(os.environ.get("STOP_AT_STEP", -1)):
            os.kill(os.getpid(), signal.SIGTERM)
        if len(seen["grads"]) == 3 and "FAULT" in os.environ:
            fault, late, _ = os.environ["FAULT"].partition(", seen late")
            if os.environ.get("RANK", "1") == "1":
                fail(fault)
            elif late:  # as on a GPU, where the CPU runs ahead: torchrun ends this rank first
                time.sleep(6)
        return clip(parameters, limit)

    return instrumented


def main() -> None:
    out, script, *flags = sys.argv[1:]
    sys.argv = [script, *flags]
    nn.utils.clip_grad_norm_ = instrument_gradients(nn.utils.clip_grad_norm_)
    if os.environ.get("FAULT") == "hang at start" and os.environ["RANK"] == "1":
        rank_checks.probe_all_reduce = lambda device: time.sleep(1000)
    if "ONE_CARD" in os.environ:
        os.environ |= {"NCCL_HOSTID": os.environ["RANK"], "LOCAL_WORLD_SIZE": "1"}
    torch.use_deterministic_algorithms(True)
    script = __import__(Path(script).stem)
    exit_now, rank = os._exit, int(os.environ.get("RANK", 0))

    def save(status=0):
        seen["weights"] = [p.detach().clone() for p in parameters]
        torch.save(seen, Path(out) / f"rank{rank}.pt")

    def save_and_exit(status):
        save()
        exit_now(status)

    os._exit = save_and_exit  # how a signal or a user's error ends the script
    kinds = (ag_news.SourceError, dataset.DataError, model.ModelError)
    with errors.one_line_errors(*kinds, utils.UsageError, checkpoint.CheckpointError):
        script.main()
    save()
    assert not dist.is_initialized()  # the script has cleaned up


if __name__ == "__main__":
    main()
