"""A step of training, drawn to scale: python -m benchmarks.timeline --record

Trains four times for 13 steps with `train_ddp.py --profile`, on CPU processes over gloo, and keeps
of each trace the step of median length: one process, two ranks, two ranks that accumulate under
no_sync, two with sparse embeddings, all at the same global batch. DistilBERT-base's shape with
random weights; rows from AG_NEWS_DIR or else the sample. `make report` draws docs/step.svg from the
record. Without --record it is written to runs/.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import pandas as pd

from benchmarks.figures import RESULTS, ROOT, read, record_header, short, write_record
from benchmarks.plots import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, figure, svg
from training import machine

PANELS = {  # what: (processes, forwards per step of each, further flags)
    "one process": (1, 1, []),
    "two ranks": (2, 1, []),
    "two ranks, 4 micro-batches, the first 3 under no_sync": (2, 4, []),
    "two ranks, --sparse-embeddings": (2, 1, ["--sparse-embeddings"]),
}
BATCH = 64  # rows per step
COLOURS = {"forward": BLUE, "backward": GREEN, "clip": GREY, "optimizer": PURPLE}


def union(intervals: list[tuple[float, float]], gap: float = 200.0) -> list[tuple[float, float]]:
    """The intervals merged, also across gaps of up to `gap` microseconds."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def outside(intervals: list[tuple[float, float]], start: float, end: float) -> list[tuple]:
    """The parts of [start, end] that the merged intervals do not cover."""
    edges = [start, *(t for part in intervals for t in part if start < t < end), end]
    covered = any(a <= start < b for a, b in intervals)
    return list(itertools.pairwise(edges))[covered::2]


def step_rows(traces: list[dict]) -> list[dict]:
    """The ranges of one step of every rank, in ms from its start: the step of median length."""
    steps = []
    for trace in traces:
        # ranks share the host's clock, but each trace counts from a base of its own
        base = trace["baseTimeNanoseconds"] / 1e3
        events = [e | {"ts": e["ts"] + base} for e in trace["traceEvents"] if e.get("ph") == "X"]
        marks = [e for e in events if e["name"].startswith("ProfilerStep#")]
        steps.append((events, sorted((e["ts"], e["ts"] + e["dur"]) for e in marks)))
    lengths = sorted((end - start, number) for number, (start, end) in enumerate(steps[0][1]))
    number = lengths[len(lengths) // 2][1]
    zero = min(windows[number][0] for _, windows in steps)
    rows = []
    for rank, (events, windows) in enumerate(steps):
        start, end = windows[number]
        inside = [e for e in events if start <= e["ts"] < end]
        main_thread = next(e for e in inside if e["name"].startswith("ProfilerStep#"))["tid"]
        # arithmetic: what PyTorch's operators did on the thread that trains
        own = [e for e in inside if e["tid"] == main_thread and e["name"].startswith("aten::")]
        work = union([(e["ts"], e["ts"] + e["dur"]) for e in own])
        whole = {"rank": rank, "lane": "step", "name": "step"}
        rows.append(whole | {"start_ms": (start - zero) / 1e3, "ms": (end - start) / 1e3})
        for event in inside:
            if event.get("cat") == "distrinews":
                span = event["ts"], event["ts"] + event["dur"]
                parts = [(event["tid"], *span)]
                if event["tid"] == "communication":  # the parts beside which the rank only waits
                    parts += [("exposed", *part) for part in outside(work, *span)]
                rows += [
                    {"rank": rank, "lane": lane, "name": event["name"]}
                    | {"start_ms": (first - zero) / 1e3, "ms": (last - first) / 1e3}
                    for lane, first, last in parts
                ]
    return rows


def profile(world_size: int, flags: list, folder: Path) -> tuple[list[dict], dict]:
    """The traces of a run of 13 steps, and its run record."""
    command = ["bash", ROOT / "training" / "run_ddp.sh", *flags, "--epochs", 100, "--max-steps", 13]
    command += ["--max-eval-samples", 8, "--fresh", "--checkpoint-dir", folder / "checkpoints"]
    command += ["--profile", folder / "traces"]
    # a process has the same cores alone as beside another
    env = os.environ | {"NPROC_PER_NODE": str(world_size), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": str(max(1, machine.cores() // 2))}
    done = subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}error: the run ended with status {done.returncode}")
    paths = [folder / "traces" / f"rank{rank}.json" for rank in range(world_size)]
    record = json.loads(next((folder / "runs").glob("*.json")).read_text())
    return [json.loads(path.read_text()) for path in paths], record


def main() -> None:
    from benchmarks.bench_training import make_backbone

    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/")
    args, header, load, rows = parser.parse_args(), record_header(), os.getloadavg()[0], []
    source = os.environ.get("AG_NEWS_DIR", "sample")
    data = ["--data", source if source == "sample" else Path(source).resolve()]
    data += ["--max-train-samples", 13 * BATCH + 200] if source != "sample" else []
    with tempfile.TemporaryDirectory() as place:
        model = make_backbone(Path(place) / "backbone")
        for number, (panel, (world_size, forwards, more)) in enumerate(PANELS.items()):
            print(f"{number + 1} of {len(PANELS)}: {panel}", flush=True)
            folder = Path(place) / str(number)
            folder.mkdir()
            flags = ["--model", model, *data, "--global-batch-size", BATCH, *more]
            flags += ["--micro-batch-size", BATCH // world_size // forwards]
            traces, run = profile(world_size, flags, folder)
            rows += [{"panel": panel} | row for row in step_rows(traces)]
    record = header | {
        "load_average": load,
        "model": "DistilBERT-base, random weights",
        "global_batch_size": BATCH,
        "precision": run["precision"],
        "threads": run["threads"],
    }
    out = (RESULTS if args.record else ROOT / "runs") / "timeline.json"
    write_record(out, record, rows)
    print(f"wrote {out.relative_to(ROOT)}; make report draws it")


def summary() -> dict | None:
    """The record, and for each rank of each panel the milliseconds of its step and of its parts."""
    record = read("timeline")
    if record is None:
        return None
    rows, panels = pd.DataFrame(record["rows"]), []
    for (name, rank), own in rows.groupby(["panel", "rank"], sort=False):
        compute = own[own.lane == "compute"].groupby("name").ms.sum()
        panel = {"name": name, "rank": rank, "step": own[own.lane == "step"].ms.sum()}
        panel |= {part: compute[part] for part in ("forward", "backward")}
        panel["after"] = compute["clip"] + compute["optimizer"]
        panel |= {"communication": 0, "exposed": 0}
        gradients = own[own.name.str.contains(":")]
        for lane, bars in gradients.groupby("lane"):  # buckets overlap: time counts once
            spans = union(list(zip(bars.start_ms, bars.start_ms + bars.ms, strict=True)), gap=0)
            panel[lane] = sum(last - first for first, last in spans)
        panels.append(panel)
    return record | {"panels": panels}


def draw() -> str | None:
    """The picture, to scale."""
    record = read("timeline")
    if record is None:
        return None
    rows, y, ticks = pd.DataFrame(record["rows"]), 0.0, []
    scale = (rows.start_ms + rows.ms).max()
    drawing, axes = figure(10, 6.4)
    for panel, few in rows.groupby("panel", sort=False):
        longest = few[few.lane == "step"].ms.max()
        axes.text(0, y - 0.15, f"{panel}: {longest:,.0f} ms", weight="bold", va="bottom")
        ranks = few["rank"].nunique()
        for rank in range(ranks):
            own = few[few["rank"] == rank]
            draw_lane(axes, own[own.lane == "compute"], y + 0.4, scale)
            ticks.append((y + 0.4, f"rank {rank}, compute" if ranks > 1 else "compute"))
            if ranks > 1:
                for lane in ("communication", "exposed"):
                    draw_lane(axes, own[own.lane == lane], y + 1.2, scale)
                ticks.append((y + 1.2, "communication"))
            y += 1.75 if ranks > 1 else 0.9
        y += 0.75
    sent = {"sent while the rank computes": {"color": LIGHT}}
    sent["sent while it waits"] = {"color": ORANGE, "hatch": "////", "edgecolor": "white"}
    styles = {name: {"color": colour} for name, colour in COLOURS.items()} | sent
    handles = [axes.barh(-9, 0, label=name, **style) for name, style in styles.items()]
    axes.legend(handles=handles, ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.08))
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.set_ylim(y - 0.3, -0.75)
    axes.set_xlim(0, 1.01 * scale)
    rows_a_step = record["global_batch_size"]
    axes.set_xlabel(f"ms, {short(record['host'])}; {rows_a_step} rows per step in all")
    return svg(drawing)


def draw_lane(axes, ranges: pd.DataFrame, y: float, scale: float) -> None:
    colours = {"communication": LIGHT, "exposed": ORANGE}
    labelled = -scale  # up to where; all-reduces overlap where one waits for another
    for one in ranges.itertuples():
        style = {"color": colours.get(one.lane) or COLOURS.get(one.name, GREY)}
        if one.lane == "exposed" and one.ms > 0.004 * scale:
            style |= {"hatch": "////", "edgecolor": "white", "linewidth": 0}
        axes.barh(y, one.ms, left=one.start_ms, height=0.7, **style)
        label = f"{one.ms:,.0f}" if one.lane == "communication" else f"{one.name} {one.ms:,.0f}"
        width = scale * len(label) * (0.013 if one.lane == "communication" else 0.009)
        left = one.start_ms + (one.ms - width) / 2
        if one.lane != "exposed" and one.ms > width and left > labelled:
            labelled = left + width
            how = {"color": "white"}
            if one.lane == "communication":
                how = {"bbox": {"boxstyle": "round,pad=0.1", "facecolor": "white", "linewidth": 0}}
            how |= {"ha": "center", "va": "center", "size": 7, "zorder": 5}
            axes.text(one.start_ms + one.ms / 2, y, label, **how)


if __name__ == "__main__":
    main()
