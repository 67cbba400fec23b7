"""Runs the training scripts as real processes on gloo, as torchrun would."""

import faulthandler
import json
import multiprocessing
import os
import re
import runpy
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
    """The tests' own: no Hub, no data of the machine's, no GPU, one thread a process."""
    env = {k: v for k, v in os.environ.items() if k not in ("AG_NEWS_DIR", "RANK", "WORLD_SIZE")}
    paths = os.pathsep.join([str(ROOT / "training"), str(ROOT)])
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": CACHE.name, "OMP_NUM_THREADS": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"PYTHONPATH": paths} | extra


def run(command: list, cwd: Path, seconds=120, as_user=False, **extra: str):
    """What the command printed, and its status; `as_user`: without the tests' PYTHONPATH."""
    env = environment(**extra)
    if as_user:
        del env["PYTHONPATH"]
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, timeout=seconds, capture_output=True, text=True
    )


# Every rank is a process of its own, forked from a server that has imported torch already: that
# takes seconds, and the tests start hundreds of ranks.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "torch.distributed", "transformers", "tqdm", "safetensors.torch"]
)


def run_script(argv: list[str], cwd: Path, env: dict[str, str], out: str, err: str) -> None:
    """Becomes `python argv` in `cwd` with `env`, its output going to the files out and err."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by the fork server
    faulthandler.enable()
    torch.set_num_threads(1)  # OMP_NUM_THREADS came too late: torch is loaded
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd)
    sys.argv = argv
    sys.path[:0] = [str(Path(argv[0]).parent), *env["PYTHONPATH"].split(os.pathsep)]
    runpy.run_path(argv[0], run_name="__main__")


def without_gloo(stdout: str) -> str:
    """Without the lines that gloo's C++ prints there in torch 2.10."""
    return re.sub(r"^\[Gloo\] Rank .*\n", "", stdout, flags=re.MULTILINE)


class Rank:
    """One process: started at once; `collect` waits for it, and fills in what it printed."""

    def __init__(self, argv: list, cwd: Path, **extra: str):
        self.out, self.err = (tempfile.NamedTemporaryFile("r") for _ in range(2))
        arguments = ([*map(str, argv)], cwd, environment(**extra), self.out.name, self.err.name)
        self.process = FORKS.Process(target=run_script, args=arguments)
        self.process.start()

    def collect(self) -> None:
        self.process.join()
        self.status = self.process.exitcode
        self.stdout, self.stderr = without_gloo(self.out.read()), self.err.read()


def run_ranks(
    world_size: int, argv: list, cwd: Path, seconds=100, more_for_rank_1=(), **extra: str
) -> list[Rank]:
    """The same command once for every rank, with the environment that torchrun sets.

    As under torchrun the store is held outside of the ranks, so its port is never lost to another
    program between its choice and its use. Once a rank has failed the others get 20 seconds more;
    one that hangs is aborted, and its traceback is in its stderr.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    meet |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    meet |= {"TORCHELASTIC_USE_AGENT_STORE": "True"} | extra
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    meet |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    # NCCL refuses two ranks on one card, unless it takes them for ranks of two hosts
    places = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "NCCL_HOSTID": f"host{r}"} for r in range(world_size)
    ]
    more = [more_for_rank_1 if r == 1 else () for r in range(world_size)]
    ranks = [Rank([*argv, *more[r]], cwd, **meet, **places[r]) for r in range(world_size)]
    until, failed = time.monotonic() + seconds, False
    while running := [rank for rank in ranks if rank.process.is_alive()]:
        if not failed and any(rank.process.exitcode for rank in ranks):
            failed, until = True, min(until, time.monotonic() + 20)
        if time.monotonic() > until:
            for rank in running:
                os.kill(rank.process.pid, signal.SIGABRT)
            break
        time.sleep(0.02)
    for rank in ranks:
        rank.collect()
    return ranks


def train(world_size: int, flags: list, cwd: Path, status: int = 0, **extra: str) -> list[Rank]:
    """Trains with `flags`: with train_single.py where world_size is 0, else with train_ddp.py.

    What tests/instrument.py saw in each rank is its `seen`; rank 0 has the run record as `record`.
    """
    script = ROOT / "training" / ("train_ddp.py" if world_size else "train_single.py")
    out = cwd / f"seen{len(list(cwd.glob('seen*')))}"
    out.mkdir(parents=True)
    argv = [ROOT / "tests" / "instrument.py", out, script, *flags, "--report", out / "record.json"]
    if world_size:
        ranks = run_ranks(world_size, argv, cwd, **extra)
    else:
        ranks = [Rank(argv, cwd, **extra)]
        ranks[0].collect()
    said = "\n".join(f"rank {r}: {x.status}\n{x.stdout}{x.stderr}" for r, x in enumerate(ranks))
    assert {rank.status for rank in ranks} == {status}, said
    for r, rank in enumerate(ranks):
        if (file := out / f"rank{r}.pt").exists():  # not where a rank was killed
            rank.seen = torch.load(file, map_location="cpu")
    if (out / "record.json").exists():
        ranks[0].record = json.loads((out / "record.json").read_text())
    return ranks


def losses(rank: Rank) -> list[float]:
    """The loss of every step of a run on a CPU, over all ranks."""
    return [point["loss"] for point in rank.record["curve"]]
