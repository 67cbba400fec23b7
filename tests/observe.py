"""One rank of a real training script, watched: `python tests/observe.py OUT SCRIPT [flags]`.

Runs the script's own main() and saves to OUT/rank<r>.pt what no command line shows: the gradients
of each step as the optimizer gets them, the rows of each step, the final weights and their logits,
how many gradient buckets were all-reduced in each step, how many checkpoints were written. The
environment can break one thing: STOP_AT_STEP=n sends this process SIGTERM in its n-th step,
NO_SET_EPOCH=1 forgets set_epoch.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DistributedSampler

import dataset
import gradients
import utils

seen = {"grads": [], "rows": [], "buckets": [], "saves": 0}
parameters = []
buckets = 0
share_gradients = gradients.share_gradients


def watch_gradients(clip):
    def watched(params, limit):
        global parameters, buckets
        parameters = list(params)
        seen["grads"].append([p.grad.clone() for p in parameters])
        seen["buckets"].append(buckets)
        buckets = 0
        if len(seen["grads"]) == int(os.environ.get("STOP_AT_STEP", -1)):
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(parameters, limit)

    return watched


def watch_rows(steps_of):
    def watched(self):
        seen["rows"].append([])
        for rows in steps_of(self):
            seen["rows"][-1].append(rows)
            yield rows

    return watched


def count_buckets(model, compression, sparse):
    if compression != "none" or sparse:
        return share_gradients(model, compression, sparse)

    def hook(group, bucket):
        global buckets
        buckets += 1
        dist.all_reduce(bucket.buffer())  # waited for: no Python is left to run in gloo's threads
        done = torch.futures.Future()
        done.set_result(bucket.buffer().div_(dist.get_world_size()))
        return done

    model.register_comm_hook(None, hook)


def count_saves(save_checkpoint):
    def counted(*args, **kwargs):
        seen["saves"] += 1
        save_checkpoint(*args, **kwargs)

    return counted


def main() -> None:
    out, script, *flags = sys.argv[1:]
    sys.argv = [script, *flags]
    nn.utils.clip_grad_norm_ = watch_gradients(nn.utils.clip_grad_norm_)
    dataset.LengthWindows.__iter__ = watch_rows(dataset.LengthWindows.__iter__)
    gradients.share_gradients = count_buckets
    utils.save_checkpoint = count_saves(utils.save_checkpoint)
    if os.environ.get("NO_SET_EPOCH"):
        DistributedSampler.set_epoch = lambda self, epoch: None
    torch.use_deterministic_algorithms(True)
    exit_now = os._exit
    rank = int(os.environ.get("RANK", 0))

    def save(status=0):
        seen["weights"] = [p.detach().clone() for p in parameters]
        torch.save(seen, Path(out) / f"rank{rank}.pt")

    def save_and_exit(status):
        save()
        exit_now(status)

    os._exit = save_and_exit  # how a signal or a user's error ends the script
    with utils.one_line_errors(utils.UsageError, utils.CheckpointError, dataset.DataError):
        __import__(Path(script).stem).main()
    save()
    assert not dist.is_initialized()  # the script has cleaned up after itself


if __name__ == "__main__":
    main()
