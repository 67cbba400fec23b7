"""Finds the recipe on the validation split: python -m benchmarks.sweep [--rows 8000]

First three learning rates for every batch, scaled by the square-root rule from batch to batch;
then, for the default batch and its best learning rate, other numbers of epochs and warm-ups.
One run per core at a time. Needs AG_NEWS_DIR and the packaged backbone. Results are added to
results/sweep.json after every run; what is already there for these rows is not run again.
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

from benchmarks.figures import ROOT, record_header, write_record

RECORD = ROOT / "benchmarks" / "results" / "sweep.json"
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


def train(recipe: dict, rows: int) -> dict:
    """Run the real script on one core with this recipe; its last epoch's validation figures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, ROOT / "training" / "train_single.py", "--model", "packaged"]
        command += ["--max-train-samples", rows, "--checkpoint-dir", folder, "--report", report]
        for flag, value in recipe.items():
            command += [f"--{flag}", value]
        one_core = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*map(str, command)], cwd=folder, check=True, env=one_core, capture_output=True
        )
        record = json.loads(report.read_text())
    last = record["epochs"][-1]
    figures = {"val_accuracy": last["val_accuracy"], "val_loss": last["val_loss"]}
    return {"recipe": recipe} | figures | {k: record[k] for k in ("val_samples", "host")}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000)
    args = parser.parse_args()
    if not os.environ.get("AG_NEWS_DIR"):
        sys.exit("error: set AG_NEWS_DIR to a folder with AG News; a sweep on less says little")
    os.environ["AG_NEWS_DIR"] = str(Path(os.environ["AG_NEWS_DIR"]).resolve())
    runs = []
    if RECORD.exists():
        former = json.loads(RECORD.read_text())
        if former["train_samples"] == args.rows:
            runs = former["runs"]

    def best() -> dict:
        ours = [run for run in runs if run["recipe"]["global-batch-size"] == BATCH]
        return max(ours, key=lambda run: run["val_accuracy"], default={"recipe": {}})["recipe"]

    def attempt(recipe: dict) -> None:
        if any(run["recipe"] == recipe for run in runs):
            return
        runs.append(train(recipe, args.rows))
        print(f"{recipe} -> {runs[-1]['val_accuracy']:.4f}", flush=True)
        hosts = sorted({run["host"] for run in runs})
        record = record_header() | {
            "host": "; ".join(hosts),
            "model": "packaged",
            "train_samples": args.rows,
            "best": best(),
            "runs": runs,
        }
        write_record(RECORD, record)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(attempt, GRID))
        chosen = best()
        list(pool.map(attempt, [chosen | {flag: v} for flag in TRIED for v in TRIED[flag]]))
    print("best:", best())


if __name__ == "__main__":
    main()
