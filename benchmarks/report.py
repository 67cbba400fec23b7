"""Writes the pages from templates/ and the records in results/: python -m benchmarks.report

A page is benchmarks/templates/NAME.md.j2 as a whole; README and docs hold sections, each between
`<!-- records: NAME -->` and `<!-- end -->`, from templates/sections/. No number is typed by hand.
"""

import math
import re
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks import cost_model, figures, plots, timeline
from benchmarks.figures import ROOT, read, short, speeds

BENCHMARKS = ROOT / "benchmarks"
TEMPLATES = BENCHMARKS / "templates"
WRITTEN = {
    "single_gpu": BENCHMARKS / "single_gpu.md",
    "ddp_2gpu": BENCHMARKS / "ddp_2gpu.md",
    "inference": BENCHMARKS / "inference.md",
    "reliability": ROOT / "docs" / "reliability.md",
}
PAGES = [ROOT / "README.md", ROOT / "docs" / "ddp_explained.md", ROOT / "docs" / "cluster.md"]
PAGES += [ROOT / "training" / "sample_data" / "README.md"]
SERVERS = {
    "pipeline": "`pipeline` in a `def` endpoint, fp32",
    "litserve_1": "LitServe, one worker, fp32",
    "litserve_2": "LitServe, two workers, fp32",
    "infinity": "Infinity, fp32",
    "torch": "this repo, torch fp32",
    "int8": "this repo, OpenVINO int8",
}

# Cells


def measured(values, digits: int = 1, missing: str = "`make bench ARGS=--record`") -> str:
    """The median in bold, the lowest and highest where they differ; a command if there is none."""
    if not len(values):
        return missing
    median, low, high = (f"{x:,.{digits}f}" for x in (values.median(), values.min(), values.max()))
    return f"**{median}**" if low == high else f"**{median} ({low} to {high})**"


def predicted(values, digits: int = 1) -> str:
    """A predicted value, or (pessimistic, likely, optimistic)."""
    low, likely, high = values if isinstance(values, list) else [values] * 3
    if math.isnan(likely):
        return ""
    low, high = sorted([low, high])
    span = f" ({low:,.{digits}f} to {high:,.{digits}f})" if low != high else ""
    return f"*≈ {likely:,.{digits}f}{span}*"


def recipe(run: dict) -> str:
    return (
        f"lr {run['lr']:.2g}, batch {run['global_batch_size']}, epochs {len(run['epochs'])}, "
        f"dropout {run['config']['dropout']:g}, warm-up {run['warmup']:g}"
    )


def place(run: dict) -> str:
    """Where it ran, and whether its processes had to share a GPU."""
    gpus, processes = run.get("gpus", 0), run.get("processes_per_host", run["world_size"])
    shared = f", {gpus} card{'s' * (gpus > 1)} for {processes} processes" * (0 < gpus < processes)
    return short(run["host"]) + shared


def trained_on(run: dict) -> str:
    data = "the sample" if run["data"] == "sample" else "AG News"
    processes = f"{run['world_size']} process{'es' * (run['world_size'] > 1)}"
    return f"{run['model']}, {run['train_samples']:,} rows of {data}, {processes}"


# Records with a form of their own


def new_seeds() -> list[dict]:
    """The runs whose seeds were named before they ran, of a recipe that was fixed by then."""
    found = figures.runs("train_single", "train_ddp", folder="recipes")
    return [run for name, run in found.items() if "_seed" in name]


def serving(kind: str, name: str = "inference_speed") -> pd.DataFrame:
    rows = pd.DataFrame(read(name)["rows"])
    return rows[rows.kind == kind]


def statuses(rows: pd.DataFrame) -> str:
    return ", ".join(sorted({status for seen in rows.statuses for status in seen}))


def kill_groups(record: dict) -> list[tuple[tuple[str, str], list[dict]]]:
    groups = {}
    for one in record["kills"]:
        one |= {"ended": one["status"] == 0, "clean": not one["left_behind"]}
        victim = one["victim"] if one["victim"] == "torchrun" else f"rank {one['victim']}"
        moment = "during a save" if one["saving"] else "between saves"
        groups.setdefault((victim, moment), []).append({"equal": False} | one)
    everything = [one for kills in groups.values() for one in kills]
    return [*sorted(groups.items()), (("all", ""), everything)]


def corrupt_share(record: dict, way: str, file: str) -> str:
    files = [one for one in record["files"] if (one["way"], one["file"]) == (way, file)]
    good = [o for o in files if o["refused"] and not o["code_ran"] and o.get("fell_back", True)]
    return f"{len(good)} of {len(files)}"


def lab(*names: str) -> str:
    """Experiments of training/lab.py, with the seconds that each takes where they are known."""
    seconds = (figures.read("lab") or {"seconds": {}})["seconds"]
    took = [f" ({seconds[name]:.0f} s)" if seconds.get(name, 0) >= 1 else "" for name in names]
    return "`lab.py " + ", `".join(f"{n}`{t}" for n, t in zip(names, took, strict=True))


def mark(number: int) -> str:
    """A link to the line of train_ddp.py where mark `number` first stands."""
    lines = (ROOT / "training" / "train_ddp.py").read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if f"# DDP {number}/7: " in text)
    return f"[{number}](training/train_ddp.py#L{line})"


def environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = speeds()
    first = next((speed for speed in found if speed.ddp), found[0] if found else None)
    env.filters |= {f.__name__: f for f in (measured, predicted, recipe, short, trained_on, place)}
    env.filters["accuracy"] = "{:.4f}".format
    env.filters["ms"] = lambda seconds, unit=" ms": f"{1e3 * seconds:,.0f}{unit}"
    env.tests["empty"] = lambda values: not len(values)
    env.tests["contains"] = lambda text, part: part in text
    env.globals |= vars(cost_model) | vars(figures) | globals()
    env.globals |= {
        "speeds": found,
        "speed": first,
        "plots": plots.draw(),
        "curves": plots.curves(),
        "timeline": timeline.summary(),
    }
    return env


def render(name: str, env: Environment) -> str:
    text = env.get_template(f"{name}.md.j2").render()
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def fill(text: str, env: Environment) -> str:
    """The page with every section written anew."""
    return re.sub(
        r"(<!-- records: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + render(f"sections/{match[2]}", env) + match[3],
        text,
        flags=re.DOTALL,
    )


def pages() -> dict[Path, str]:
    env = environment()
    written = {path: render(name, env) for name, path in WRITTEN.items()}
    return written | {path: fill(path.read_text(), env) for path in PAGES}


def main() -> None:
    drawn = plots.draw() | {"../../docs/step.svg": timeline.draw()}
    plots.FOLDER.mkdir(exist_ok=True)
    files = pages() | {(plots.FOLDER / name).resolve(): svg for name, svg in drawn.items() if svg}
    for old in set(plots.FOLDER.glob("*.svg")) - files.keys():
        old.unlink()
        print(f"removed {old.relative_to(ROOT)}")
    for path, text in files.items():
        changed = not path.exists() or path.read_text() != text
        path.write_text(text)
        print(f"{'wrote' if changed else 'unchanged:'} {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
