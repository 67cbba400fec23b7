"""Kills a two-process training at random moments, and compares its end with an undisturbed one.

python -m tests.faults.kill [--kills 30] [--seed 0] [--out FILE]       (make faults)

A kill is SIGKILL to rank 0, rank 1 or torchrun: after a random time, or in the middle of a save. A
rank is started again by torchrun (MAX_RESTARTS); after the launcher's death the same command is
given again.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import psutil
import torch

from benchmarks.figures import record_header, write_record
from tests import fakes
from tests.ranks import ROOT, environment
from training import checkpoint

STEPS = 420  # of a run: about five seconds, once it has started


def processes(mark: str) -> dict[int, str]:
    """Those whose environment has FAULT_RUN=mark: their pid, and their RANK if they have one."""
    found = {p: p.info["environ"] or {} for p in psutil.process_iter(["environ"])}
    return {p.pid: env.get("RANK", "") for p, env in found.items() if env.get("FAULT_RUN") == mark}


class Run:
    """One training, started through run_ddp.sh in `folder`; started again by the same command."""

    def __init__(self, folder: Path, backbone: Path, news: Path):
        self.folder, self.mark = folder, folder.name
        folder.mkdir()
        flags = f"--model {backbone} --data {news} --checkpoint-dir {folder / 'c'} --epochs 30 "
        flags += f"--max-steps {STEPS} --global-batch-size 8 --save-every 3 --max-eval-samples 8"
        self.command = ["bash", str(ROOT / "training" / "run_ddp.sh"), *flags.split()]
        self.last = folder / "c" / "last.pt"

    def start(self) -> None:
        self.log = open(self.folder / "log", "a")
        env = environment(FAULT_RUN=self.mark, NPROC_PER_NODE="2", MAX_RESTARTS="3")
        self.process = subprocess.Popen(
            self.command, cwd=self.folder, env=env, stdout=self.log, stderr=self.log
        )

    def wait_for(self, condition, seconds=60.0, pause=0.05) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if condition():
                return True
            time.sleep(pause)
        return False

    def pid_of(self, victim: str) -> int | None:
        """torchrun's pid, or that of a rank, once it is there."""
        if victim == "torchrun":
            return self.process.pid
        by_rank = {rank: pid for pid, rank in processes(self.mark).items()}
        return by_rank.get(victim)


def kill_once(run: Run, chance: random.Random) -> dict:
    """Starts, kills, resumes to the end; says what happened."""
    victim, in_save = chance.choice(["0", "1", "torchrun"]), chance.random() < 0.4
    after = chance.uniform(0.0, 9.0)
    began = time.monotonic()
    run.start()
    run.wait_for(lambda: run.pid_of(victim))
    pid = run.pid_of(victim)
    temporary = checkpoint.temporary_path(run.last)
    if in_save:
        run.wait_for(lambda: run.last.exists())
        time.sleep(after / 9)
        run.wait_for(temporary.exists, pause=0.0002)
    else:
        time.sleep(max(0.0, began + after - time.monotonic()))
    found = {"victim": victim, "saving": temporary.exists()}
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # the run was faster
        found["victim"] = "none: it had ended"
    if victim == "torchrun":
        run.process.wait()
        run.wait_for(lambda: not processes(run.mark), 10)
        run.start()
    try:
        status = run.process.wait(200)
    except subprocess.TimeoutExpired:
        status = "hangs"
        for pid in processes(run.mark):
            os.kill(pid, signal.SIGKILL)
    return found | {"status": status}


def weights(run: Run) -> dict:
    path = run.folder / "c" / "distilbert_agnews.pt"
    return checkpoint.load_checkpoint(path, ("model",))["model"]


def left_behind(run: Run) -> list[str]:
    files = [path.name for path in (run.folder / "c").iterdir()]
    kept = {"distilbert_agnews.pt", "distilbert_agnews.previous.pt", "tokenizer"}
    return sorted({*files} - kept) + [f"process {pid}" for pid in processes(run.mark)]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args, header = parser.parse_args(), record_header()
    kills = []
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        backbone = fakes.make_backbone(place / "tiny", 0.1)
        news = fakes.make_news(place / "news")
        straight = Run(place / "straight", backbone, news)
        straight.start()
        assert straight.process.wait(200) == 0, (straight.folder / "log").read_text()
        expected = weights(straight)
        for number in range(args.kills):
            seed = 1000 * args.seed + number
            run = Run(place / f"kill{seed}", backbone, news)
            found = {"seed": seed} | kill_once(run, random.Random(seed))
            if found["status"] == 0:
                got = weights(run)
                found["equal"] = all(torch.equal(got[name], expected[name]) for name in expected)
            run.wait_for(lambda run=run: not processes(run.mark), 5)
            found["left_behind"] = left_behind(run) if found["status"] == 0 else ["no end"]
            kills.append(found)
            print(json.dumps(found), flush=True)
            if found["status"]:
                print((run.folder / "log").read_text()[-2000:], flush=True)
    good = sum(one.get("equal", False) and not one["left_behind"] for one in kills)
    print(f"{good} of {len(kills)} ended as the undisturbed run did, with nothing left behind")
    if args.out:
        write_record(args.out, header | {"steps": STEPS, "kills": kills})
    sys.exit(good != len(kills))


if __name__ == "__main__":
    main()
