"""Runs the training scripts as real processes on gloo, as torchrun would."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CACHE = tempfile.TemporaryDirectory()  # tokens of the tests' few texts, made once for all of them


def environment(**extra: str) -> dict[str, str]:
    """The tests' own: no Hub, no data of the machine's, one thread a process."""
    env = {k: v for k, v in os.environ.items() if k not in ("AG_NEWS_DIR", "RANK", "WORLD_SIZE")}
    paths = os.pathsep.join([str(ROOT / "training"), str(ROOT)])
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": CACHE.name, "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"PYTHONPATH": paths} | extra


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(world_size: int, argv: list, cwd: Path, **extra: str) -> list[subprocess.Popen]:
    """The same command once for every rank, with the environment that torchrun sets."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meet |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, argv)],
            cwd=cwd,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **meet, **extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


class Rank:
    """What one process printed, how it ended, and what tests/observe.py saw in it."""

    def __init__(self, process: subprocess.Popen, file: Path):
        self.stdout, self.stderr = process.communicate(timeout=120)
        self.status = process.returncode
        self.seen = torch.load(file) if file.exists() else {}


def observe(world_size: int, flags: list, cwd: Path, status: int = 0, **extra: str) -> list[Rank]:
    """Trains with `flags`: with train_single.py where world_size is 0, else with train_ddp.py."""
    script = ROOT / "training" / ("train_ddp.py" if world_size else "train_single.py")
    out = cwd / f"seen{len(list(cwd.glob('seen*')))}"
    out.mkdir(parents=True)
    argv = [ROOT / "tests" / "observe.py", out, script, *flags]
    if world_size:
        processes = start_ranks(world_size, argv, cwd, **extra)
    else:
        env = environment(**extra)
        command = [sys.executable, *map(str, argv)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, cwd=cwd, env=env, **pipes)]
    ranks = [Rank(process, out / f"rank{r}.pt") for r, process in enumerate(processes)]
    for rank in ranks:
        assert rank.status == status, rank.stdout + rank.stderr
    return ranks
