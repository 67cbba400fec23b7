"""Finds the recipe on the validation split: python -m benchmarks.sweep [--all-rows]

On 8,000 rows three learning rates for every batch, scaled by the square-root rule from batch to
batch; then, for the default batch and its best learning rate, other numbers of epochs and warm-ups.
--all-rows: three learning rates and two numbers of epochs for the default batch, with three seeds
each, since single runs differ by as much as recipes do.
One run per core at a time. Needs AG_NEWS_DIR and the packaged backbone. Results are added to
results/sweep.json or sweep_all_rows.json after every run; what is there is not run again.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from threading import Lock

from benchmarks.figures import RESULTS, ROOT, record_header, write_record
from training import machine

ROWS = 8000
BATCH = 256  # the default, for which epochs and warm-up are tried, too
GRID = [
    {
        "global-batch-size": batch,
        "lr": round(peak * math.sqrt(batch / 32), 7),
        "epochs": 2,
        "warmup": 0.1,
    }
    for batch in (256, 128, 64)
    for peak in (7e-5, 1.4e-4, 2.8e-4)
]
TRIED = {"epochs": [1, 3], "warmup": [0.05, 0.2]}
ALL_ROWS = [
    {"global-batch-size": BATCH, "lr": lr, "epochs": epochs, "warmup": 0.1, "seed": seed}
    for seed in range(3)
    for epochs in (5, 3)
    for lr in (1e-4, 2e-4, 4e-4)
]


def best(runs: list[dict]) -> dict:
    """The default batch's recipe of the lowest validation loss, over its seeds on average."""
    found = {}
    for run in runs:
        if run["recipe"]["global-batch-size"] == BATCH:
            name = json.dumps({k: v for k, v in run["recipe"].items() if k != "seed"})
            found.setdefault(name, []).append(run["val_loss"])
    return json.loads(min(found, key=lambda name: fmean(found[name]), default="{}"))


def train(recipe: dict, rows: int | None) -> dict:
    """Run the real script on one core with this recipe; its last epoch's validation figures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, ROOT / "training" / "train_single.py", "--model", "packaged"]
        command += ["--checkpoint-dir", folder, "--report", report]
        command += ["--max-train-samples", rows] if rows else []
        for flag, value in recipe.items():
            command += [f"--{flag}", value]
        one_core = os.environ | {"OMP_NUM_THREADS": "1"}
        how = {"cwd": folder, "env": one_core, "capture_output": True, "text": True}
        done = subprocess.run([*map(str, command)], **how)
        if done.returncode:
            raise SystemExit(done.stderr)
        record = json.loads(report.read_text())
    last = record["epochs"][-1]
    figures = {"val_accuracy": last["val_accuracy"], "val_loss": last["val_loss"]}
    return {"recipe": recipe} | figures | {k: record[k] for k in ("val_samples", "host")}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--all-rows", action="store_true")
    args = parser.parse_args()
    rows = None if args.all_rows else ROWS
    path = RESULTS / ("sweep_all_rows.json" if args.all_rows else "sweep.json")
    if not os.environ.get("AG_NEWS_DIR"):
        sys.exit("error: set AG_NEWS_DIR to a folder with AG News; a sweep on less says little")
    os.environ["AG_NEWS_DIR"] = str(Path(os.environ["AG_NEWS_DIR"]).resolve())
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    header, lock = record_header(), Lock()

    def attempt(recipe: dict) -> None:
        if any(run["recipe"] == recipe for run in runs):
            return
        run = train(recipe, rows)
        with lock:
            runs.append(run)
            more = {"model": "packaged", "train_samples": rows, "best": best(runs), "runs": runs}
            hosts = "; ".join(sorted({run["host"] for run in runs}))
            write_record(path, header | {"host": hosts} | more)
        print(f"{recipe} -> validation loss {run['val_loss']:.4f}", flush=True)

    with ThreadPoolExecutor(machine.cores()) as pool:
        list(pool.map(attempt, ALL_ROWS if args.all_rows else GRID))
        if not args.all_rows:
            chosen = best([run for run in runs if run["recipe"] in GRID])
            list(pool.map(attempt, [chosen | {flag: v} for flag in TRIED for v in TRIED[flag]]))
    print("best:", best(runs))


if __name__ == "__main__":
    main()
