"""Runs the training scripts as real processes on gloo, as torchrun would."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent
CACHE = tempfile.TemporaryDirectory()  # tokens of the tests' few texts, made once for all of them


def environment(**extra: str) -> dict[str, str]:
    """The tests' own: no Hub, no data of the machine's, one thread a process."""
    env = {k: v for k, v in os.environ.items() if k not in ("AG_NEWS_DIR", "RANK", "WORLD_SIZE")}
    paths = os.pathsep.join([str(ROOT / "training"), str(ROOT)])
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": CACHE.name, "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"PYTHONPATH": paths} | extra


class Rank:
    """One process: started at once; `finish` waits for it, and fills in what it printed."""

    def __init__(self, argv: list, cwd: Path, **extra: str):
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", *map(str, argv)],
            cwd=cwd, env=environment(**extra), stdout=self.out, stderr=self.err,
        )  # fmt: skip

    def collect(self) -> None:
        self.status = self.process.wait()
        for file in (self.out, self.err):
            file.seek(0)
        self.stdout, self.stderr = self.out.read(), self.err.read()


def run_ranks(world_size: int, argv: list, cwd: Path, seconds=100, **extra: str) -> list[Rank]:
    """The same command once for every rank, with the environment that torchrun sets.

    As under torchrun the store is held outside of the ranks, so its port is never lost to another
    program between its choice and its use. Once a rank has failed the others get 20 seconds more;
    one that hangs is aborted, and its traceback is in its stderr.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    meet |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    meet |= {"TORCHELASTIC_USE_AGENT_STORE": "True"} | extra
    meet["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"  # as run_ddp.sh does
    places = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]
    ranks = [Rank(argv, cwd, **meet, **place) for place in places]
    until, failed = time.monotonic() + seconds, False
    while running := [rank for rank in ranks if rank.process.poll() is None]:
        if not failed and any(rank.process.poll() for rank in ranks):
            failed, until = True, min(until, time.monotonic() + 20)
        if time.monotonic() > until:
            for rank in running:
                rank.process.send_signal(signal.SIGABRT)
            break
        time.sleep(0.02)
    for rank in ranks:
        rank.collect()
    return ranks


def observe(world_size: int, flags: list, cwd: Path, status: int = 0, **extra: str) -> list[Rank]:
    """Trains with `flags`: with train_single.py where world_size is 0, else with train_ddp.py.

    What tests/observe.py saw in each rank is in its `seen`.
    """
    script = ROOT / "training" / ("train_ddp.py" if world_size else "train_single.py")
    out = cwd / f"seen{len(list(cwd.glob('seen*')))}"
    out.mkdir(parents=True)
    argv = [ROOT / "tests" / "observe.py", out, script, *flags]
    if world_size:
        ranks = run_ranks(world_size, argv, cwd, **extra)
    else:
        ranks = [Rank(argv, cwd, **extra)]
        ranks[0].collect()
    said = "\n".join(f"rank {r}: {x.status}\n{x.stdout}{x.stderr}" for r, x in enumerate(ranks))
    assert {rank.status for rank in ranks} == {status}, said
    for r, rank in enumerate(ranks):
        if (file := out / f"rank{r}.pt").exists():  # not where a rank ended by a bug
            rank.seen = torch.load(file)
    return ranks
