"""Writes every measured figure from the records: python -m benchmarks.report

In the README files a table stands between `<!-- records: NAME -->` and `<!-- end -->`; the pages in
WRITTEN are written whole. Nothing there is typed by hand.
"""

import re
from pathlib import Path
from statistics import median

from benchmarks.interview import interview
from benchmarks.reliability_page import reliability_page
from benchmarks.speed import Speed, read
from benchmarks.training_pages import (
    ddp_page,
    plots,
    records,
    single_page,
    spread,
    table,
    weak,
)

ROOT = Path(__file__).parent.parent
PLOTS = ROOT / "benchmarks" / "plots"
PAGES = [
    ROOT / "README.md", ROOT / "docs" / "ddp_explained.md",
    ROOT / "training" / "sample_data" / "README.md",
]  # fmt: skip


def accuracy() -> str:
    rows = [
        "| | processes | test accuracy | validation accuracy | record |",
        "|---|---|---|---|---|",
    ]
    for name in ("agnews_packaged_single", "agnews_packaged_ddp"):
        run = read(name)
        rows.append(
            f"| `{run['script']}.py` | {run['world_size']} | {run['test_accuracy']:.4f} on "
            f"{run['test_samples']:,} rows | {run['epochs'][-1]['val_accuracy']:.4f} on "
            f"{run['val_samples']:,} | [{name}](benchmarks/results/{name}.json) |"
        )
    run = read("agnews_packaged_single")
    words = (
        f"Packaged backbone, {run['train_samples']:,} of AG News's 120,000 training rows, "
        f"{run['precision']}, {len(run['epochs'])} epochs, global batch "
        f"{run['global_batch_size']}, peak lr {run['lr']:g}, warm-up {run['warmup']:g}, on "
        f"{run['host']}."
    )
    return "\n".join([words, "", *rows])


def speed() -> str:
    speeds = records()
    first = next(iter(speeds.values())).record
    rows = [["ours over Trainer's defaults",
             lambda s: s.script_ratio("single", "trainer_defaults")],
            ["ours over Trainer's best flags", lambda s: s.script_ratio("single", "trainer_best")],
            ["ours over the rate of its matrix products", Speed.gemm_share],
            ["two DDP processes over two without communication",
             lambda s: s.script_ratio("ddp", "two_apart")],
            ["DDP's weak speed-up on two devices", lambda s: weak(s, first["batch"])[0]],
            ["our samples/s in one process", lambda s: s.scripts("single")]]  # fmt: skip
    cells = [[name, *(spread(f(s), 1 if "samples/s" in name else 2) for s in speeds.values())]
             for name, f in rows]  # fmt: skip
    words = (
        f"{first['model']}, batch {first['batch']}, {first['precision']}, real text lengths: "
        "median, lowest and highest round. One process in full: "
        "[single_gpu.md](benchmarks/single_gpu.md). Why two are not twice one: "
        "[ddp_2gpu.md](benchmarks/ddp_2gpu.md)."
    )
    return "\n".join([words, "", *table(["", *speeds], cells)]).rstrip()


def buckets() -> str:
    """DDP's gradient buckets, as it logged them, and what an all-reduce of each takes here."""
    speed = Speed(read("training_speed"))
    pieces = speed.pieces(2)
    rows = [[str(number), f"{size / 1e6:.1f} MB", f"{1e3 * seconds:.0f} ms"]
            for number, (size, seconds) in enumerate(zip(pieces.buckets, pieces.seconds,
                                                         strict=True))]  # fmt: skip
    host = f"all-reduce alone, on {speed.record['host']}"
    return "\n".join(table(["bucket", "size", host], rows)).rstrip()


def sample() -> str:
    run = read("sample_on_agnews")
    return (
        f"trained on the 480 alone, the packaged backbone labels {run['test_accuracy']:.3f} of "
        f"{run['test_samples']:,} real AG News test rows as AG News does (record: "
        "`benchmarks/results/sample_on_agnews.json`)."
    )


def each(loops: list[dict], name: str) -> list[float]:
    return [loop[name] for loop in loops]


def serving() -> str:
    """The README's short table: requests per second and p50, by server and callers."""
    record = read("inference_speed")
    callers = list(record["servers"]["onnx"]["loops"])
    rows = [
        "| server | " + " | ".join(f"{n} caller{'s' * (n != '1')}" for n in callers) + " |",
        "|---|" + "---|" * len(callers),
    ]
    for name, server in record["servers"].items():
        cells = [
            f"{median(each(loops, 'requests_per_second')):.0f}/s, "
            f"p50 {median(each(loops, 'p50_ms')):.0f} ms"
            for loops in server["loops"].values()
        ]
        rows.append(f"| {SERVER_NAMES[name]} | " + " | ".join(cells) + " |")
    words = (
        f"{record['model']}, real text lengths, callers on the same {record['host']}; more in "
        "[inference.md](benchmarks/inference.md)."
    )
    return "\n".join([words, "", *rows])


SERVER_NAMES = {
    "pipeline": "`pipeline` in a `def` endpoint, fp32",
    "torch": "this repo, torch fp32",
    "onnx": "this repo, ONNX Runtime int8",
}


def inference_page() -> str:
    record = read("inference_speed")
    servers, rounds = record["servers"], record["rounds"]
    page = [
        "# Serving, measured",
        "",
        f"Written by `python -m benchmarks.report` from `results/inference_speed.json`: "
        f"`{record['command']}` on {record['host']}. {record['model']}; texts: {record['texts']}. "
        f"{rounds} interleaved rounds of {record['seconds']:g} s a figure; medians, with the lowest"
        " and highest round in brackets. Callers run on the same cores as the server.",
        "",
        "| server | callers | requests/s | p50 ms | p99 ms |",
        "|---|---|---|---|---|",
    ]
    for name, server in servers.items():
        for callers, loops in server["loops"].items():
            page.append(
                f"| {SERVER_NAMES[name]} | {callers} | {spread(each(loops, 'requests_per_second'))}"
                f" | {spread(each(loops, 'p50_ms'))} | {spread(each(loops, 'p99_ms'))} |"
            )
    page += [
        "",
        "## Against the pipeline endpoint",
        "",
        "| what | torch | onnx |",
        "|---|---|---|",
    ]

    def ratio(name, callers, figure, turn=1):
        pairs = zip(
            each(servers[name]["loops"][callers], figure),
            each(servers["pipeline"]["loops"][callers], figure),
            strict=True,
        )
        return spread([(ours / theirs) ** turn for ours, theirs in pairs], 2)

    for callers in servers["onnx"]["loops"]:
        cells = [ratio(name, callers, "requests_per_second") for name in ("torch", "onnx")]
        page.append(f"| requests/s, callers: {callers}, times | {cells[0]} | {cells[1]} |")
    cells = [ratio(name, "1", "p50_ms") for name in ("torch", "onnx")]
    page.append(f"| p50, callers: 1, part | {cells[0]} | {cells[1]} |")
    page += [
        "",
        "## Start, memory, HTTP",
        "",
        "| server | start to first answer, s | resident after load, MiB | p50 at 1 caller less the"
        " p50 of the same work without HTTP, ms |",
        "|---|---|---|---|",
    ]
    for name, server in servers.items():
        bare = record["without_http_p50_ms"].get(name)
        http = "not measured" if bare is None else spread(
            [a - b for a, b in zip(each(server["loops"]["1"], "p50_ms"), bare, strict=True)], 2
        )  # fmt: skip
        page.append(
            f"| {SERVER_NAMES[name]} | {spread(server['start_seconds'])} | "
            f"{spread(server['resident_mb'], 0)} | {http} |"
        )
    runs = record["overload"]
    statuses = sorted({status for run in runs for status in run["statuses"]})
    page += [
        "",
        "## Ten times too many requests",
        "",
        "The onnx server, offered ten times its best rate at a fixed pace, whatever comes back.",
        "",
        "| what | figure |",
        "|---|---|",
        f"| offered requests/s | {spread(each(runs, 'offered_per_second'))} |",
        f"| answered requests/s | {spread(each(runs, 'answered_per_second'))} |",
        f"| statuses seen | {', '.join(statuses)} |",
        f"| 200s per second, part of the best rate | {spread(each(runs, 'share_of_best'), 2)} |",
        f"| `/health` p99, ms | {spread(each(runs, 'health_p99_ms'))} |",
        "",
        "The callers, the HTTP layer that refuses most of them, and the model share the machine. "
        "How many cores each kept busy:",
        "",
        "| load | model | HTTP | callers |",
        "|---|---|---|---|",
    ]
    most = max(servers["onnx"]["loops"], key=int)
    loads = {f"{most} callers that wait": servers["onnx"]["loops"][most], "ten times": runs}
    for name, load in loads.items():
        cores = each(load, "cores")
        cells = [spread(each(cores, who), 2) for who in ("model", "http", "callers")]
        page.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(page) + "\n"


TABLES = {
    "accuracy": accuracy, "speed": speed, "sample": sample, "serving": serving,
    "buckets": buckets, "interview": interview,
}  # fmt: skip
WRITTEN = {
    ROOT / "benchmarks" / "inference.md": inference_page,
    ROOT / "benchmarks" / "single_gpu.md": single_page,
    ROOT / "benchmarks" / "ddp_2gpu.md": ddp_page,
    ROOT / "docs" / "reliability.md": reliability_page,
}


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
    for page, write in WRITTEN.items():
        page.parent.mkdir(exist_ok=True)
        page.write_text(write())
    PLOTS.mkdir(exist_ok=True)
    drawn = plots()
    for old in PLOTS.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, content in drawn.items():
        (PLOTS / name).write_bytes(content)
