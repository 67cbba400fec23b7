"""What the training scripts share. all_reduce_sum and evaluate work without a process group too."""

import argparse
import importlib.util
import math
import os
import re
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


class UsageError(Exception):
    """A request that cannot be met; the message is one line and names the remedy."""


PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BACKENDS = ("auto", "nccl", "gloo")
LR_HELP = "peak (default: 3e-5 * sqrt(global batch / 32); 1.4e-4 * ... if narrower than 768)"


# Processes


def torchrun_ranks() -> tuple[int, int, int]:
    """(rank, local_rank, world_size) as torchrun set them in this process's environment."""
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    if not all(os.environ.get(name) for name in names):
        raise UsageError("train_ddp.py is started by torchrun: bash training/run_ddp.sh [flags]")
    return tuple(int(os.environ[name]) for name in names[:3])


def collective_timeout() -> timedelta:
    """How long a collective may wait for the other ranks: TIMEOUT in seconds, or ten minutes."""
    value = os.environ.get("TIMEOUT") or "600"
    if not value.isdecimal() or not 1 <= int(value) <= 86400:
        raise UsageError(f"TIMEOUT={value}: expected seconds, 1 to 86400")
    return timedelta(seconds=int(value))


def all_reduce_sum(values: list[float]) -> list[float]:
    """The sums over all ranks in float64, which keeps counts exact. Every rank must call it."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)  # on the CPU, so gloo carries it
    dist.all_reduce(tensor)
    return tensor.tolist()


def cleanup_distributed() -> None:
    """Ends the process group once all ranks have come here, rank 0 with everything saved."""
    all_reduce_sum([0.0])  # a barrier on the CPU
    time.sleep(0.3)  # without it some exits hung: gloo's threads were releasing tensors
    dist.destroy_process_group()
    if "LAUNCHER_PID" in os.environ:
        with suppress(OSError):
            os.kill(int(os.environ["LAUNCHER_PID"]), signal.SIGURG)  # see torchrun.py


# Device and precision


def choose_device(backend: str = "auto", local_rank: int = 0) -> tuple[torch.device, str]:
    """(this rank's device, the backend): nccl where every rank has its own GPU, gloo otherwise."""
    gpus = torch.cuda.device_count()
    launched = dist.is_torchelastic_launched()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched else 1
    if not gpus:
        if backend == "nccl":
            raise UsageError("--backend nccl needs a GPU, and none is visible; use auto or gloo")
        return torch.device("cpu"), "gloo"
    if local_world_size > gpus and backend != "gloo":
        raise UsageError(
            f"{local_world_size} processes, but {gpus} GPU{'s' * (gpus > 1)}; set NPROC_PER_NODE="
            f"{gpus}, or let processes share a GPU with --backend gloo"
        )
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)  # otherwise every rank would also open GPU 0
    return device, "gloo" if backend == "gloo" else "nccl"


def choose_precision(choice: str, device: torch.device) -> tuple[str, str]:
    """`--precision` -> (fp32, bf16 or fp16; why)."""
    if choice == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU; on a CPU use auto, bf16 or fp32")
    if choice != "auto":
        return choice, "set by --precision"
    if device.type == "cuda":
        # not is_bf16_supported(): it is true on a T4, which only emulates bf16
        major, minor = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16", f"compute capability {major}.{minor}"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32", "what this CPU can do is unknown"
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return "bf16", f"this CPU has {flag}"
    return "fp32", "this CPU has no bf16 arithmetic"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context, for every forward, in which matmuls run in 16 bits; weights stay fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


# Flags


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line, and that prints once however many ranks there are."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # --fres would be --fresh to argparse alone
        )

    def error(self, message: str) -> None:
        raise UsageError(f"{message}; --help lists all flags")

    def print_help(self, file=None) -> None:
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
            super().print_help(file)


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for a flag whose value makes no sense; expands ~ in the others."""
    if any(word == "" or re.fullmatch("--[a-z-]+=", word) for word in sys.argv[1:]):
        raise UsageError("a flag's value is empty: is a variable of the shell not set?")
    for name, value in vars(args).items():
        if isinstance(value, str | Path):  # no shell expands --flag=~/folder
            setattr(args, name, type(value)(os.path.expanduser(value)))
        least = 0 if name == "seed" else 1
        if type(value) is int and not least <= value < 2**63:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {value}: expected at least {least}, below 2^63")
    if not 8 <= args.max_length <= 512:
        raise UsageError(f"--max-length {args.max_length}: expected 8 to 512")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise UsageError(f"--lr {args.lr}: expected a number above 0")
    if not 0 <= args.warmup <= 1:
        raise UsageError(f"--warmup {args.warmup}: expected a share of all steps, 0 to 1")
    if args.dropout is not None and not 0 <= args.dropout <= 0.99:
        raise UsageError(f"--dropout {args.dropout}: expected 0 to 0.99")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UsageError("--tensorboard needs a package: pip install tensorboard")


def split_batch(args: argparse.Namespace, world_size: int, device: torch.device) -> tuple[int, int]:
    """(micro_batch_size, grad_accum_steps): micro x world_size x grad_accum_steps = global exactly.

    The default micro-batch is the largest divisor of a process's share up to 128, on a CPU 32.
    """
    global_batch_size, micro_batch_size = args.global_batch_size, args.micro_batch_size
    unit = (micro_batch_size or 1) * world_size
    if global_batch_size % unit:
        below = global_batch_size - global_batch_size % unit
        nearest = below if below and global_batch_size - below <= unit / 2 else below + unit
        rows = f"{micro_batch_size} rows x " if micro_batch_size else ""
        processes = f"{world_size} process{'es' * (world_size > 1)}"
        raise UsageError(
            f"--global-batch-size {global_batch_size} is not divisible by {unit} "
            f"({rows}{processes}); the nearest that is: {nearest}"
        )
    share = global_batch_size // world_size
    most = 128 if device.type == "cuda" else 32
    micro_batch_size = micro_batch_size or max(n for n in range(1, most + 1) if share % n == 0)
    return micro_batch_size, share // micro_batch_size


# Steps


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Makes the dropout masks of a step a function of seed, step and rank.

    So a resumed run draws the same masks with no generator state saved, and ranks draw different
    ones.
    """
    sequence = np.random.SeedSequence([seed, step, rank])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def default_lr(dim: int, global_batch_size: int) -> float:
    """3e-5 (a backbone narrower than 768: 1.4e-4) at 32 rows, times sqrt(rows / 32).

    The square root rule for Adam: https://arxiv.org/abs/2205.10287
    """
    return (3e-5 if dim >= 768 else 1.4e-4) * math.sqrt(global_batch_size / 32)


def set_lr(optimizer, step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Sets and returns the lr of `step`: linear warm-up over `warmup` of all steps, then decay."""
    warmup_steps = max(1, round(warmup * total_steps))
    lr = peak * (total_steps - step) / max(1, total_steps - warmup_steps)
    if step < warmup_steps:
        lr = peak * (step + 1) / warmup_steps
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices alone, not biases and LayerNorm weights."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def evaluate(model: nn.Module, loader, device, autocast) -> tuple[float, float]:
    """(mean loss, accuracy) over all rows, exact at any world size. Every rank calls it.

    Takes the unwrapped model: DDP's forward is a collective if a model has buffers, and ranks may
    hold different numbers of batches. The loss is in nats.
    """
    model.eval()
    loss_sum = correct = count = 0.0
    with torch.inference_mode():
        for input_ids, attention_mask, labels in loader:
            labels = labels.to(device)
            with autocast:
                logits = model(input_ids.to(device), attention_mask.to(device)).float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
    model.train()
    loss_sum, correct, count = all_reduce_sum([loss_sum, correct, count])
    assert count == len(loader.dataset)  # each row on exactly one rank
    return loss_sum / count, correct / count
