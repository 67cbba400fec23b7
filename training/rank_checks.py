"""What must hold on all ranks before they train together; each check ends the run with one line."""

import argparse
import hashlib
import os
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from errors import NCCL_REMEDY
from utils import UsageError, all_reduce_sum


def check_devices(device: torch.device) -> None:
    """Raises UsageError on every rank if some ranks have a GPU and others see none."""
    [gpus] = all_reduce_sum([float(device.type == "cuda")])
    if 0 < gpus < dist.get_world_size():
        has = "has one" if device.type == "cuda" else "sees none"
        raise UsageError(
            f"{gpus:.0f} of {dist.get_world_size()} ranks have a GPU, host {os.uname().nodename} "
            f"{has}; see nvidia-smi on every host, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )


def probe_all_reduce(device: torch.device) -> None:
    """One all-reduce, which ends the process with one line if it hangs for a minute.

    All ranks have come here at about the same time, so only the transport can be the cause. Later,
    a rank may be slow for good reasons, and the time-out of a collective is longer.
    """
    seconds, finished = min(60, float(os.environ.get("TIMEOUT") or 60)), threading.Event()

    def watch() -> None:
        if not finished.wait(seconds):
            text = f"the first all-reduce did not end within {seconds:.0f} s; {NCCL_REMEDY}"
            if os.environ["LOCAL_RANK"] == "0":
                os.write(2, f"error: {text}\n".encode())
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    total = ones.item()  # waits for the GPU
    finished.set()
    if total != dist.get_world_size():
        raise RuntimeError(f"NCCL error: ones on {dist.get_world_size()} ranks add up to {total}")


def check_same_on_all_ranks(args: argparse.Namespace, recipe: dict, sources: str) -> None:
    """Raises UsageError on every rank if a rank's recipe or flags differ from rank 0's.

    `sources`: the model and the data that this rank found, for the message.
    """
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    own = {"the code": hashlib.sha256(code).hexdigest()[:16], "torch": torch.__version__}
    for name in ("save_every", "sparse_embeddings", "backend"):
        own[f"--{name.replace('_', '-')}"] = getattr(args, name)
    everyone = [None] * dist.get_world_size()
    host = f"{os.uname().nodename}, {sources}"
    dist.all_gather_object(everyone, {"host": host, **own, **recipe})
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if name != "host" and value != (first := everyone[0][name]):
                raise UsageError(
                    f"{name} differs: {value} on rank {rank} (host {theirs['host']}), {first} on "
                    f"rank 0 (host {everyone[0]['host']}); all need the same code, data and flags"
                )
