"""The machine a run is on: its cores, its memory, whether it reaches the Hub, its name.

torch is imported where it is needed: the server asks for the cores, and its image has no torch.
"""

import ctypes
import math
import os
import platform
import resource
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent


def cores() -> int:
    """CPU cores that this process may use: its affinity, and its container's CPU quota."""
    allowed = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return allowed
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = Path("/sys/fs/cgroup", "cpu" if controllers else "", path.lstrip("/"))
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        for level in (folder, *folder.parents):  # every enclosing group limits it as well
            try:
                quota, period = " ".join((level / name).read_text() for name in files).split()
                if quota != "max" and int(quota) > 0:
                    allowed = min(allowed, math.ceil(int(quota) / int(period)))
            except (OSError, ValueError):
                continue
    return max(1, allowed)


def tune_cpu() -> None:
    """Uses the allowed cores, and keeps freed memory for the next step's activations.

    Memory given back to the kernel would be cleared page by page when it is taken again. A full
    oneDNN cache, 1,024 kernels for as many shapes, would fragment it, so it is limited to 64.
    """
    import torch

    if not os.environ.get("OMP_NUM_THREADS"):  # torchrun sets it
        torch.set_num_threads(cores())
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc, nothing to tune
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def set_offline_mode(seconds: float = 5) -> bool:
    """Sets HF_HUB_OFFLINE unless the Hugging Face Hub answers; returns whether it does.

    In a thread, since a silent name server blocks for longer than any socket timeout.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    answers = []

    def ask():
        url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds)
        except urllib.error.HTTPError:
            pass  # also an answer
        except Exception as error:  # no route, a wrong address, a server without HTTP
            # a certificate that Python cannot check: the Hub's own client has other authorities
            if not isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported, later
    return bool(answers)


def host(device=None) -> str:
    """The machine in a few words: its GPU, or its CPU and the cores that this process may use."""
    if device and device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores()} core{'s' * (cores() > 1)}"


def versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {"python": platform.python_version(), **packages, "os": platform.system()}


def git_commit() -> str | None:
    """The checkout's commit, with -dirty where tracked files were changed; else GIT_COMMIT."""
    found = ""
    if (ROOT / ".git").exists():  # otherwise git would find a repository around this one
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
            found = done.stdout.strip()
    return found or os.environ.get("GIT_COMMIT")


def peak_memory_mb(device) -> float:
    """MiB: on a GPU the most that tensors took, else the most that this process held resident."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
