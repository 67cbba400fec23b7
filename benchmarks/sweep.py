"""Finds the recipe on the validation split: python -m benchmarks.sweep [--rows 8000]

First every batch with three learning rates, which follow the square-root rule from batch to batch;
then, for the default batch and its best learning rate, other numbers of epochs and warm-ups. Needs
AG_NEWS_DIR and the packaged backbone; writes results/sweep.json.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from training import machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BATCH = 256  # the default, for which epochs and warm-up are tried, too
RECIPE = {"epochs": 2, "warmup": 0.1}
GRID = [
    {"global-batch-size": batch, "lr": peak * math.sqrt(batch / 32)} | RECIPE
    for batch in (64, 128, 256)
    for peak in (7e-5, 1e-4, 1.4e-4)
]
TRIED = {"epochs": [1, 3], "warmup": [0.05, 0.2]}


def train(recipe: dict, rows: int) -> dict:
    """The real script with this recipe; its validation figures after the last epoch."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, ROOT / "training" / "train_single.py", "--model", "packaged",
                   "--max-train-samples", rows, "--checkpoint-dir", folder,
                   "--report", report]  # fmt: skip
        for flag, value in recipe.items():
            command += [f"--{flag}", value]
        subprocess.run([*map(str, command)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        record = json.loads(report.read_text())
    last = record["epochs"][-1]
    figures = {"val_accuracy": last["val_accuracy"], "val_loss": last["val_loss"]}
    return figures | {"val_samples": record["val_samples"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8000)
    args = parser.parse_args()
    if not os.environ.get("AG_NEWS_DIR"):
        sys.exit("error: set AG_NEWS_DIR to a folder with AG News; a sweep on less says little")
    os.environ["AG_NEWS_DIR"] = str(Path(os.environ["AG_NEWS_DIR"]).resolve())
    runs = []

    def attempt(recipe: dict) -> None:
        runs.append({"recipe": recipe} | train(recipe, args.rows))
        print(f"{recipe} -> {runs[-1]['val_accuracy']:.4f}", flush=True)

    def best() -> dict:
        ours = [run for run in runs if run["recipe"]["global-batch-size"] == BATCH]
        return max(ours, key=lambda run: run["val_accuracy"])["recipe"]

    for recipe in GRID:
        attempt(recipe)
    for flag, values in TRIED.items():
        chosen = best()
        for value in values:
            attempt(chosen | {flag: value})
    record = {
        "script": "sweep", "command": shlex.join(["python", "-m", "benchmarks.sweep",
                                                  *sys.argv[1:]]),
        "model": "packaged", "train_samples": args.rows, "best": best(), "runs": runs,
        "host": machine.host(torch.device("cpu")), "versions": machine.versions(),
        "git_commit": machine.git_commit(),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    print("best:", best())


if __name__ == "__main__":
    main()
