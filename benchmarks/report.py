"""Writes the measured tables of the README files from the records: python -m benchmarks.report

A table stands between `<!-- records: NAME -->` and `<!-- end -->`; nothing there is typed by hand.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "training" / "sample_data" / "README.md"]


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def accuracy() -> str:
    rows = [
        "| | processes | test accuracy | training time | host | record |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("agnews_packaged_single", "agnews_packaged_ddp"):
        run = read(name)
        seconds = sum(epoch["seconds"] + epoch["warmup_seconds"] for epoch in run["epochs"])
        rows.append(
            f"| `{run['script']}.py` | {run['world_size']} | {run['test_accuracy']:.4f} on "
            f"{run['test_samples']:,} rows | {seconds / 60:.0f} min, {len(run['epochs'])} epoch | "
            f"{run['host']}, {run['precision']} | [{name}](benchmarks/results/{name}.json) |"
        )
    run = read("agnews_packaged_single")
    words = (
        f"Packaged backbone, {run['train_samples'] + run['val_samples']:,} of AG News's 120,000 "
        f"training rows, global batch {run['global_batch_size']}, peak lr {run['lr']:g}. The "
        "machine was shared with other work, so the times say little: speed is measured apart."
    )
    return "\n".join([words, "", *rows])


def speed() -> str:
    record = read("training_speed")
    rows = ["| | median | lowest and highest |", "|---|---|---|"]
    for name, ratio in record["ratios"].items():
        low, high = min(ratio["all"]), max(ratio["all"])
        rows.append(f"| {name} | {ratio['median']:.2f} | {low:.2f} to {high:.2f} |")
    words = (
        f"{record['model']}, batch {record['batch']}, {record['precision']}, real text lengths, "
        f"{len(record['rounds'])} interleaved rounds on {record['host']} "
        "([training_speed](benchmarks/results/training_speed.json)). GEMM rate: the model's own "
        "matrix products, back to back."
    )
    return "\n".join([words, "", *rows])


def sample() -> str:
    run = read("sample_on_agnews")
    return (
        f"trained on the 480 alone, the packaged backbone labels {run['test_accuracy']:.3f} of "
        f"{run['test_samples']:,} real AG News test rows as AG News does (record: "
        "`benchmarks/results/sample_on_agnews.json`)."
    )


TABLES = {"accuracy": accuracy, "speed": speed, "sample": sample}


def fill(text: str) -> str:
    """The page with every table written anew."""
    return re.sub(
        r"(<!-- records: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
