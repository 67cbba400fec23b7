"""The run record: a JSON file that tells what ran, where, with which result, and its loss curve.

`history` holds what grows while training: `epochs`, and `curve`, at most 500 points of {step, loss,
lr, grad_norm, samples_per_second}. It is saved in last.pt, so a resumed run continues it.
"""

import json
import math
import os
import shlex
import sys
import threading
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ag_news import LABELS
from errors import print0
from machine import ROOT, git_commit, host, peak_memory_mb, versions
from utils import UsageError

CURVE_POINTS = 500
SMALLEST_SCALE = 1e-3  # 26 skipped steps


def start_record(args, data, model, model_source, precision, micro_batch_size, total_steps) -> dict:
    """The run record, as far as it is known before the first step; rank 0 prints a summary.

    `model_source` and `precision` are (what, why).
    """
    distributed = dist.is_initialized()
    world_size = dist.get_world_size() if distributed else 1
    device = next(model.parameters()).device
    command = ["python"]
    if distributed:
        command = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    command += [os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]
    names = ("max_length", "global_batch_size", "lr", "warmup", "seed")
    record = {
        "script": Path(sys.argv[0]).stem,
        "command": shlex.join(command),
        "started": datetime.now().isoformat(timespec="seconds"),
        "model": model_source[0],
        "data": data.source,
        "data_fingerprint": data.fingerprint,
        "tokenizer_digest": data.tokenizer_digest,
        "labels": list(LABELS),
        **{name: getattr(args, name) for name in names},
        "micro_batch_size": micro_batch_size,
        "grad_accum_steps": args.global_batch_size // world_size // micro_batch_size,
        "world_size": world_size,
        "processes_per_host": int(os.environ["LOCAL_WORLD_SIZE"]) if distributed else 1,
        "total_steps": total_steps,
        "train_samples": len(data.train),
        "val_samples": len(data.val),
        "test_samples": len(data.test),
        "config": asdict(model.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": precision[0],
        "device": device.type,
        "gpus": torch.cuda.device_count() if device.type == "cuda" else 0,
        "backend": dist.get_backend() if distributed else None,
        "threads": torch.get_num_threads(),
        "host": host(device),
        "git_commit": git_commit(),
        "versions": versions(),
    }
    left_out = len(data.train) % args.global_batch_size
    processes = f"{world_size} process{'es' * (world_size > 1)}"
    print0(f"""\
model: {model_source[0]} ({model_source[1]}), {record["parameters"]:,} parameters
data: {data.source} ({data.why}), {len(data.train):,} training rows{data.note}
device: {processes} on {record["host"]}, {precision[0]} ({precision[1]})
steps: {total_steps:,} of {args.global_batch_size} rows ({micro_batch_size} per forward \
x {processes} x {record["grad_accum_steps"]}); peak lr {args.lr:.2g}; {left_out} rows left out""")
    return record


def ignore_oserror(args) -> None:
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


class TensorBoard:
    """Writes curves to `folder`, if there is one, until its disk is full. That ends no run."""

    def __init__(self, folder: Path | None, step: int):
        self.writer = None
        if folder:
            from torch.utils.tensorboard import SummaryWriter

            # its thread would print a traceback before write() below is told
            threading.excepthook = ignore_oserror
            # steps that a killed run did after its last save are drawn once
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, group: str, values: dict, step: int) -> None:
        try:
            for name, value in values.items() if self.writer else ():
                self.writer.add_scalar(f"{group}/{name}", value, step)
                self.writer.flush()
        except OSError as error:
            print0(f"warning: cannot write to --tensorboard any more: {error.strerror}")
            self.writer = None


def log_point(history: dict, tensorboard, total_steps: int, scaler, point: dict) -> None:
    """Adds a point to the curve where one is due, and to TensorBoard.

    Raises UsageError where the loss or the gradient is not finite, so that such a state is never
    saved. In fp16 a gradient may overflow now and then: GradScaler skips that step, and halves
    its scale. Where the scale gets tiny, it is no overflow.
    """
    overflow = scaler.is_enabled() and scaler.get_scale() > SMALLEST_SCALE
    if not math.isfinite(point["grad_norm"]) and overflow:
        point = point | {"grad_norm": None}
    for name in ("loss", "grad_norm"):
        if point[name] is not None and not math.isfinite(point[name]):
            raise UsageError(
                f"{name} is {point[name]} at step {point['step']}; start over with a lower --lr "
                "and --fresh. last.pt, if there is one, holds the last finite state"
            )
    curve, every = history["curve"], -(-total_steps // (CURVE_POINTS - 1))  # and the last
    if not curve or point["step"] - curve[-1]["step"] >= every or point["step"] == total_steps:
        curve.append(point)
    values = {name: math.nan if value is None else value for name, value in point.items()}
    step = values.pop("step")
    tensorboard.write("train", values, step)


def log_epoch(history: dict, tensorboard, step: int, epoch_sums: Tensor, val: tuple) -> None:
    """Adds an epoch's figures; rank 0 prints them. `val` is (loss, accuracy)."""
    loss_sum, correct, rows, seconds = epoch_sums.tolist()
    epoch = {
        "epoch": len(history["epochs"]) + 1,
        "train_loss": loss_sum / rows,
        "train_accuracy": correct / rows,
        "val_loss": val[0],
        "val_accuracy": val[1],
        "seconds": seconds,
        "samples_per_second": rows / seconds,
    }
    history["epochs"].append(epoch)
    print0(
        f"epoch {epoch['epoch']}: train loss {epoch['train_loss']:.4f}, accuracy "
        f"{epoch['train_accuracy']:.4f}; validation loss {val[0]:.4f}, accuracy {val[1]:.4f}; "
        f"{seconds:.1f} s"
    )
    tensorboard.write("val", {"loss": val[0], "accuracy": val[1]}, step)


def finish_record(record: dict, history: dict, test: tuple, device, report: Path | None) -> None:
    """Adds what was measured, and writes the record to runs/ and to `report`."""
    record |= history | {"test_loss": test[0], "test_accuracy": test[1]}
    record["peak_memory_mb"] = peak_memory_mb(device)
    print0(f"test: loss {test[0]:.4f}, accuracy {test[1]:.4f} on {record['test_samples']:,} rows")
    own = Path("runs") / f"{record['script']}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.json"
    for path in filter(None, (own, report)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:  # no reason to lose the model
            print0(f"warning: cannot write the run record {path}: {error.strerror}")
