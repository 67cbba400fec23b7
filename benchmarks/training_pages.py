"""benchmarks/single_gpu.md and ddp_2gpu.md, and their plots, from the records; see report.py."""

from statistics import median

from benchmarks.cost_model import flops_per_sample, gpu, waterfall
from benchmarks.speed import RESULTS, Speed, key, read
from training.model import Config

EPOCH_ROWS = 114_000  # of AG News's 120,000, less the 5 % set aside for validation
LEGEND = (
    "Three kinds of cell: **12.3** was measured, the lowest and highest round in brackets; "
    "*≈ 12.3* was predicted, from inputs given below; `a command` stands where nobody measured, "
    "and would do it."
)
BENCH = 'make bench ARGS="--device cuda"'

# Published figures for Kaggle's T4s: pessimistic, likely, optimistic; kaggle_section names sources.
T4 = {
    "rate": (12e12, 18e12, 24e12),  # FLOP/s
    "fixed": (20e-3, 13e-3, 8e-3),  # s a step: optimizer over 1.9 GB at 250 GB/s, launches
    "bandwidth": (1.5e9, 4e9, 8e9),  # bytes/s
    "latency": 12e-6,  # s a message
}
# On paper: a third of the 312 TFLOP/s that an A100 has in bf16, and links at their nominal rates.
PAPER = {"rate": 104e12, "fixed": 5e-3}
LINKS = {"NVLink, 200 GB/s": 200e9, "100 Gb Ethernet": 12.5e9, "25 Gb Ethernet": 3.125e9}
LINK_LATENCY = 10e-6  # s a message
PUBLISHED = [
    ("BERT by Hugging Face, 2 GPUs of one server", "0.94", "pytorch/pytorch#17159"),
    ("the same, 8 GPUs", "0.90", "pytorch/pytorch#17159"),
    ("the same, 2 servers of 8", "0.66", "pytorch/pytorch#17159"),
    ("Inception V3, ResNet-101, 512 GPUs, 25 Gb RoCE", "0.90", "horovod/horovod docs/benchmarks"),
    ("VGG-16, many weights for its work, the same", "0.68", "horovod/horovod docs/benchmarks"),
]
WORDS = 30522 * 768 * 4  # bytes of the word embeddings' gradient
EMBEDDINGS = WORDS + 512 * 768 * 4  # and of the positions'


def spread(values: list[float], digits: int = 1, unit: str = "") -> str:
    """The median, and the lowest and highest beside it where they differ."""
    text = f"{median(values):,.{digits}f}{unit}"
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return text if low == high else f"{text} ({low} to {high})"


def guess(value: float, digits: int = 1, unit: str = "", around=()) -> str:
    span = f" ({min(around):,.{digits}f} to {max(around):,.{digits}f})" if around else ""
    return f"*≈ {value:,.{digits}f}{unit}{span}*"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def records() -> dict[str, Speed]:
    """Every record of training speed, under a column's heading."""
    found = {}
    for path in sorted(RESULTS.glob("training_speed*.json")):
        record = read(path.stem)
        title = record["host"]
        if record["instructions"] != "all that the CPU has":
            title += f", {record['instructions']}"
        if title in found:
            title += f", {path.stem}"
        found[title] = Speed(record)
    return found


def single_hosts() -> list[str]:
    """Headings: the hosts that were measured, then those that the page only speaks of."""
    names = list(records())
    return names + [n for n in ("Kaggle, one T4", "NVIDIA H200") if not measured_on(n)]


def measured_on(host: str) -> bool:
    return any(host.split()[-1] in name for name in records())


def row(name: str, measured, t4: str = "`make kaggle`", h200: str = f"`{BENCH}`") -> list[str]:
    """A table's row: `measured(speed)` for each record, then the other hosts' cells."""
    cells = [measured(speed) for speed in records().values()]
    others = [(t4, "T4"), (h200, "H200")]
    return [name, *cells, *(cell for cell, host in others if not measured_on(host))]


def buckets() -> list[int]:
    """DistilBERT-base's gradient buckets, as DDP logged them."""
    return Speed(read("training_speed")).rounds[0]["pieces"]["2"]["buckets"]


def t4_step(
    rows: int, world_size=1, accumulation=1, size=1.0, sparse=False, case=(1, 1, 1)
) -> float:
    """Seconds of a step on Kaggle's T4s; `case` picks each of rate, fixed and bandwidth in T4."""
    rate, fixed, bandwidth = (T4[name][i] for name, i in
                              zip(("rate", "fixed", "bandwidth"), case, strict=True))  # fmt: skip
    sent, late = list(buckets()), EMBEDDINGS
    if sparse:
        touched = Speed(read("training_speed")).exchange(2, rows)["touched"] * 768 * 4
        sent[-1], late = sent[-1] - WORDS + touched, late - WORDS + touched
    return gpu(flops_per_sample(Config(), 52.5), rows, rate, fixed, sent, late,
               world_size, bandwidth, T4["latency"], accumulation, size)  # fmt: skip


def paper_step(rows: int, world_size=1, bandwidth=1.0, accumulation=1, size=1.0) -> float:
    return gpu(flops_per_sample(Config(), 52.5), rows, PAPER["rate"], PAPER["fixed"], buckets(),
               EMBEDDINGS, world_size, bandwidth, LINK_LATENCY, accumulation, size)  # fmt: skip


def head(title: str, names: list[str]) -> list[str]:
    speeds = records().values()
    links = ", ".join(f"[{name}](results/{name}.json)" for name in names)
    commands = "; ".join(f"`{speed.record['command']}` on {host}" for host, speed in
                         records().items())  # fmt: skip
    rounds = sorted({len(speed.rounds) for speed in speeds})
    model = " and ".join(sorted({speed.record["model"] for speed in speeds}))
    return [
        f"# {title}", "",
        f"Written by `make report` from the records {links}: {commands}. {model}; "
        f"real text lengths; medians of {' or '.join(map(str, rounds))} rounds.",
        "", LEGEND, "",
    ]  # fmt: skip


def accuracy_rows(*scripts: str) -> list[str]:
    """Every run record of the scripts on AG News or the sample: model, data, accuracy, time."""
    rows, base = [], False
    for name in sorted(path.stem for path in RESULTS.glob("*_*.json")):
        run = read(name)
        if run.get("script") not in scripts or name == "sample_on_agnews":
            continue
        base |= run["model"] == "distilbert-base-uncased" and run["data"] != "sample"
        seconds = [one["seconds"] + one.get("warmup_seconds", 0) for one in run["epochs"]]
        minutes = median(seconds) / 60
        by_epoch = ", ".join(f"{one['val_accuracy']:.4f}" for one in run["epochs"])
        rows.append([
            f"{run['model']}, {run['train_samples']:,} rows of "
            f"{'the sample' if run['data'] == 'sample' else 'AG News'}, "
            f"{run['world_size']} process{'es' * (run['world_size'] > 1)}",
            f"**{run['test_accuracy']:.4f}** on {run['test_samples']:,} rows", by_epoch,
            f"{minutes:.1f}", f"[{name}](results/{name}.json), {run['host']}",
        ])  # fmt: skip
    if not base:
        one = len(scripts) == 1
        command = "python training/train_single.py" if one else "bash training/run_ddp.sh"
        rows.append(["distilbert-base-uncased, all of AG News", f"`{command}`", "", "", ""])
    return table(["model, data", "test accuracy", "validation accuracy by epoch",
                  "minutes an epoch", "record"], rows)  # fmt: skip


def recipes() -> list[str]:
    """What was tried on all rows, and how it ended."""
    names = [f"recipes/{path.stem}" for path in sorted((RESULTS / "recipes").glob("*.json"))]
    runs = [read(name) for name in ("agnews_packaged_single", *names)]
    rows = [
        [f"lr {run['lr']:g}, batch {run['global_batch_size']}, epochs {len(run['epochs'])}, "
         f"dropout {run['config']['dropout']:g}, warm-up {run['warmup']:g}", str(run["world_size"]),
         f"**{run['epochs'][-1]['val_accuracy']:.4f}**", f"**{run['epochs'][-1]['val_loss']:.4f}**",
         f"**{run['test_accuracy']:.4f}**"]
        for run in runs
    ]  # fmt: skip
    return ["Recipes that were run on all rows with the packaged backbone. The first is what a "
            "sweep on 8,000 rows preferred ([sweep](results/sweep.json)), and has the highest "
            "validation accuracy:", "",
            *table(["recipe", "processes", "validation accuracy", "its loss", "test accuracy"],
                   rows)]  # fmt: skip


def single_page() -> str:
    rate = [32 / t4_step(32, case=(i, i, 1)) for i in range(3)]
    minutes = [EPOCH_ROWS / r / 60 for r in rate]

    def speed_up(other):
        return lambda speed: f"**{spread(speed.script_ratio('single', other), 2)}**"

    page = head("One process, measured", [path.stem for path in speed_records()])
    page += table(["`train_single.py`, batch 32", *single_hosts()], [
        row("samples/s", lambda speed: f"**{spread(speed.scripts('single'))}**",
            guess(rate[1], 0, "", rate)),
        row("minutes an epoch of AG News, 114,000 rows",
            lambda s: f"**{spread([EPOCH_ROWS / r / 60 for r in s.scripts('single')])}**",
            guess(minutes[1], 1, "", minutes)),
        row("times transformers' `Trainer`, its defaults", speed_up("trainer_defaults")),
        row("times `Trainer`, its best flags", speed_up("trainer_best")),
        row("times the naive recipe: `Trainer`, fp32, all rows padded to 128", speed_up("naive")),
        row("part of the rate of its matrix products alone",
            lambda speed: f"**{spread(speed.gemm_share(), 2)}**"),
        row("peak memory, MiB",
            lambda s: f"**{spread(s.scripts('single', 'peak_memory_mb'), 0)}**"),
    ])  # fmt: skip
    page += [
        "On a CPU one process has all cores here. The T4 is predicted from published figures: "
        f"{T4['rate'][1] / 1e12:.0f} ({T4['rate'][0] / 1e12:.0f} to {T4['rate'][2] / 1e12:.0f}) "
        f"TFLOP/s in fp16, and {T4['fixed'][1] * 1e3:.0f} ({T4['fixed'][2] * 1e3:.0f} to "
        f"{T4['fixed'][0] * 1e3:.0f}) ms a step for the optimizer and launches "
        "([ddp_2gpu.md](ddp_2gpu.md) names the sources).", "",
        "## Accuracy", "",
        *accuracy_rows("train_single"),
        "The times in this table were taken while the machine did other work too, and say "
        "nothing of speed; the table above does.", "", *recipes(),
        "## By batch size", "",
        "![samples/s by batch size](plots/throughput.svg)", "",
    ]  # fmt: skip
    for host, speed in records().items():
        launches = ["1", *(["all cores"] if "all cores" in speed.rounds[0]["pieces"] else [])]
        names = {"1": "one GPU" if speed.cuda else "one core's share", "all cores": "all cores"}
        for launch in launches:
            rows = []
            for one in speed.settings(launch):
                micro, k = one["micro"], one.get("accumulation", 1)
                rates = [micro * k / seconds for seconds in one["step"]]
                kind = one["precision"] + (", compiled" if one.get("compiled") else "")
                rows.append([
                    str(micro) + (f" x {k} accumulated" if k > 1 else ""), kind,
                    f"**{spread(rates)}**", f"**{spread([1e3 * t for t in one['compute']], 0)}**",
                    f"**{spread([1e3 * t for t in one['update']], 0)}**",
                ])  # fmt: skip
            threads = speed.rounds[0]["pieces"][launch]["threads"]
            page += [f"{host}, {names[launch]} ({threads} thread{'s' * (threads > 1)}):", ""]
            page += table(["rows", "precision", "samples/s", "forward and backward, ms",
                           "clip and optimizer, ms"], rows)  # fmt: skip
    return "\n".join(page).rstrip() + "\n"


def speed_records():
    return sorted(RESULTS.glob("training_speed*.json"))


def strong(speed: Speed, micro: int) -> tuple[list[float], float]:
    """One process over two at the same global batch, 2 x micro: (measured by round, predicted)."""
    one, two = speed.find(1, "single", 2 * micro), speed.find(2, "ddp", micro)
    guessed = speed.predicted(1, one) / speed.predicted(2, two)
    return ratio(one, two), guessed


def weak(
    speed: Speed, micro: int, accumulation=1, compression="none", sparse=False
) -> tuple[list[float], float]:
    """Rows/s of two processes over those of one, each with the same rows of its own."""
    one = speed.find(1, "single", micro, accumulation)
    two = speed.find(2, "ddp", micro, accumulation, compression, sparse)
    guessed = 2 * speed.predicted(1, one) / speed.predicted(2, two)
    return ratio(one, two, 2), guessed


def ratio(one: dict, two: dict, times: float = 1) -> list[float]:
    return [times * a / b for a, b in zip(one["step"], two["step"], strict=True)]


def middle(speed: Speed) -> int:
    """The rows of each process at which the waterfall was measured."""
    return speed.micros(2, "apart")[0]


def steps_of_the_way(speed: Speed) -> tuple[int, list[tuple[str, float]]]:
    """(rows of each process, the waterfall's rows)."""
    micro = middle(speed)
    found = [speed.find(1, "single", 2 * micro), speed.find(1, "single", micro)]
    found += [speed.find(2, variant, micro) for variant in ("apart", "no_sync", "ddp")]
    figures = [{name: median(one[name]) for name in ("step", "update", "imbalance")}
               for one in found]  # fmt: skip
    figures[-1]["world_size"] = 2
    return micro, waterfall(*figures)


def compared(speed: Speed) -> list[tuple[str, dict, float]]:
    """(launch, setting, predicted seconds) of all that the cost model was not calibrated on."""
    known = {launch: [key(one) for one in speed.calibration(launch)]
             for launch in speed.world_sizes}  # fmt: skip
    return [
        (str(launch), one, speed.predicted(launch, one))
        for launch in speed.world_sizes
        for one in speed.settings(launch)
        if one["variant"] in ("single", "ddp") and key(one) not in known[launch]
        and one["precision"] == speed.record["precision"] and not one.get("compiled")
    ]  # fmt: skip


def errors(speed: Speed) -> list[float]:
    return [abs(guessed / median(one["step"]) - 1) for _, one, guessed in compared(speed)]


def describe(one: dict) -> str:
    text = f"{one['micro']} rows"
    if one.get("accumulation", 1) > 1:
        text += f", {one['accumulation']} accumulated"
    if one.get("compression", "none") != "none":
        text += f", sent as {one['compression']}"
    return text + (", sparse embeddings" if one.get("sparse") else "")


def host_sections(host: str, speed: Speed) -> list[str]:
    """What one host with two devices or more has to say."""
    micro, way = steps_of_the_way(speed)
    device = "a GPU" if speed.cuda else f"{speed.rounds[0]['pieces']['1']['threads']} of its cores"
    page = [f"## {host}", "", f"A device is {device}.", "", "### Speed-up by batch size", ""]
    rows = []
    for rows_each in speed.micros(2, "ddp"):
        cells = [str(rows_each)]
        try:
            got, guessed = strong(speed, rows_each)
            cells += [f"**{spread(got, 2)}**", guess(guessed, 2)]
        except StopIteration:  # --quick leaves out one process at twice the largest batch
            cells += [f"`{BENCH if speed.cuda else 'make bench'}`", ""]
        got, guessed = weak(speed, rows_each)
        rows.append([*cells, f"**{spread(got, 2)}**", guess(guessed, 2)])
    page += table(["rows of each process", "strong: same global batch", "predicted",
                   "weak: same batch in each process", "predicted"], rows)  # fmt: skip
    rows = []
    for one in speed.settings(2):
        choices = [one.get("accumulation", 1), one.get("compression", "none"),
                   one.get("sparse", False)]  # fmt: skip
        if one["variant"] == "ddp" and choices != [1, "none", False]:
            got, guessed = weak(speed, one["micro"], *choices)
            rows.append([describe(one), f"**{spread(got, 2)}**", guess(guessed, 2)])
    page += ["### Accumulation, compression, sparse embeddings", ""]
    page += table(["each process", "weak", "predicted"], rows)

    page += [f"### Where the time goes: global batch {2 * micro}", "",
             f"![waterfall](plots/waterfall_{slug(host)}.svg)", ""]  # fmt: skip
    page += table(["", "ms"], [[name, f"**{1e3 * seconds:,.0f}**"] for name, seconds in way])
    page += ["### Why not twice as fast", "", *reasons(speed, micro, dict(way)), ""]

    two = speed.pieces(2)
    launches = [one["pieces"]["2"] for one in speed.rounds]
    page += ["### The pieces", ""]
    page += table(["piece", "measured"], [
        *([f"forward and backward of {tokens:,.0f} padded tokens",
           f"**{1e3 * seconds:,.0f} ms**"] for tokens, seconds in two.compute),
        ["clip and optimizer", f"**{1e3 * two.update:.0f} ms**"],
        ["collating", f"**{1e6 * two.data:.2f} µs a token**"],
        ["agreeing on going on", f"**{1e3 * two.agree:.2f} ms**"],
        ["slowest rank over the mean", f"**{100 * two.imbalance:.1f} %** of forward and backward"],
        ["matrix products, one device",
         f"**{spread([one['pieces']['1']['gemm'] / 1e9 for one in speed.rounds], 0)} GFLOP/s**"],
        ["matrix products, two at once",
         f"**{spread([one['gemm'] / 1e9 for one in launches], 0)} GFLOP/s**"],
    ])  # fmt: skip
    kinds = sorted(launches[0]["all_reduce"], key=["none", "bf16", "fp16"].index)
    rows = [
        [str(number), f"{size / 2**20:.1f}",
         *(f"**{spread([1e3 * one['all_reduce'][kind][number] for one in launches], 1)}**"
           for kind in kinds)]
        for number, size in enumerate(launches[0]["buckets"])
    ]  # fmt: skip
    rows.append(["all", f"{sum(launches[0]['buckets']) / 2**20:.1f}",
                 *(f"**{spread([1e3 * sum(one['all_reduce'][kind]) for one in launches], 0)}**"
                   for kind in kinds)])  # fmt: skip
    page += ["All-reduce of each of DDP's buckets, nothing else running, in the order in which "
             "backward fills them:", ""]  # fmt: skip
    page += table(["bucket", "MiB", *(f"{'fp32' if kind == 'none' else kind}, ms"
                                      for kind in kinds)], rows)  # fmt: skip

    off = errors(speed)
    page += ["### Predicted against measured", "",
             f"![predicted against measured](plots/predicted_{slug(host)}.svg)", "",
             "[cost_model.py](cost_model.py) knows the pieces above, learnt from steps without "
             f"communication at {calibration(speed)} rows a process (one alone: "
             f"{calibration(speed, 1)}). On the "
             f"{len(off)} settings below, none of which it was calibrated on, its median error "
             f"is **{100 * median(off):.1f} %** and its worst **{100 * max(off):.1f} %**.", ""]
    page += table(["processes", "each", "step measured, ms", "predicted, ms", "error"], [
        [launch, describe(one), f"**{spread([1e3 * t for t in one['step']], 0)}**",
         guess(1e3 * guessed, 0), f"{100 * (guessed / median(one['step']) - 1):+.1f} %"]
        for launch, one, guessed in compared(speed)
    ])  # fmt: skip
    return page


def calibration(speed: Speed, launch: int = 2) -> str:
    return ", ".join(str(one["micro"]) for one in speed.calibration(launch))


def reasons(speed: Speed, micro: int, way: dict[str, float]) -> list[str]:
    """The waterfall in words; every number is one of the page's."""
    two, measured = speed.pieces(2), way["DDP, measured"]
    whole, shown = sum(two.seconds), way["exposed communication"]

    def ms(seconds):
        return f"{1e3 * seconds:,.0f} ms"

    got, _ = strong(speed, micro)
    largest = speed.micros(2, "ddp")[-1]
    accumulated = max(one.get("accumulation", 1) for one in speed.settings(2))
    words = [
        f"- At a global batch of {2 * micro} rows a step takes {ms(way['one process'])} in one "
        f"process and {ms(measured)} in two: {median(got):.2f} times as fast.",
        f"- Clip and optimizer go over all {sum(two.buckets) / 2**20:.0f} MiB of weights on every "
        f"rank, however few rows it has: {ms(way['update, done by every rank'])} that a second "
        "process does not halve.",
        f"- Half the rows take {ms(way['smaller batches'])} more than half the time of the whole.",
        f"- Two processes at work without communication take "
        f"{ms(way['contention for the machine'])} more than one alone: they share the memory, and "
        "on a CPU the caches and the clock too. Less than nothing is noise.",
        f"- Every step ends when its slower rank does: {ms(way['imbalance of the ranks'])}.",
        f"- The all-reduce takes {ms(whole)} alone. With it a step is {ms(shown)} longer than "
        f"without" + (f", so backward hides {100 * (1 - shown / whole):.0f} % of it."
                      if 0 <= shown <= whole else ", so nothing of it is hidden.")
        + (f" The last bucket, {two.buckets[-1] / 2**20:.0f} MiB with the word embeddings, is full "
           f"when backward ends: its {ms(two.seconds[-1])} cannot be hidden by anything."),
        f"- {ms(way['unexplained'])} are unexplained: what DDP costs beside these, and noise.",
        f"- What helps is more work for each exchange: at {largest} rows in each process the weak "
        f"speed-up is {median(weak(speed, largest)[0]):.2f}, at 8 it is "
        f"{median(weak(speed, 8)[0]):.2f}; with {accumulated} micro-batches of 16 accumulated it "
        f"is {median(weak(speed, 16, accumulated)[0]):.2f}, with one "
        f"{median(weak(speed, 16)[0]):.2f}.",
    ]  # fmt: skip
    if not speed.cuda and "all cores" in speed.rounds[0]["pieces"]:
        both = speed.script_ratio("ddp", "single")
        words.append(
            f"- A CPU is a place to learn DDP, not to profit from it: `train_ddp.py` in two "
            f"processes does {median(both):.2f} times the samples/s of `train_single.py` on the "
            "same cores."
        )
    return words


def kaggle_section() -> list[str]:
    """Two T4s, from published figures."""
    rows = []
    for micro in (32, 128):
        for kind, k, size, sparse in (
            ("plain", 1, 1.0, False), ("`--sparse-embeddings`", 1, 1.0, True),
            ("`--grad-compression fp16`", 1, 0.5, False), ("both", 1, 0.5, True),
            ("4 accumulated", 4, 1.0, False),
        ):  # fmt: skip
            speeds = [2 * t4_step(micro, 1, k) / t4_step(micro, 2, k, size, sparse, (1, 1, i))
                      for i in range(3)]  # fmt: skip
            rate = 2 * micro * k / t4_step(micro, 2, k, size, sparse)
            rows.append([str(micro), kind, guess(speeds[1], 2, "", speeds), guess(rate, 0)])
    low, mid, high = (f"{value / 1e9:g}" for value in T4["bandwidth"])
    return [
        "## Kaggle's two T4s", "",
        f"Nobody has measured them for this page yet: `make kaggle` does. Predicted at "
        f"{T4['rate'][1] / 1e12:.0f} TFLOP/s, {1e3 * T4['fixed'][1]:.0f} ms a step for optimizer "
        f"and launches, and {mid} GB/s between the cards ({low} to {high}). Where the inputs come "
        "from: a T4's 24 TFLOP/s in fp16 before its power limit (forums.developer.nvidia.com, "
        "about-gpu-peak-performance, 264462), of which three quarters; 4 GB/s by nccl-tests on two "
        "cards of that generation without peer-to-peer (Anthony-Hoo/Anthony-Hoo.github.io, AutoDL "
        "interconnection test); 1.5 implied by a DDP run on Kaggle (dev.to, ddp-is-not-always-"
        "faster-23mh); 8 if peer-to-peer works.", "",
        *table(["rows of each process", "how", "weak speed-up", "samples/s"], rows),
    ]  # fmt: skip


def paper_section() -> list[str]:
    """Eight, 64 and 512 GPUs, by the formulas alone."""
    rows = []
    for micro, k, size, how in (
        (32, 1, 1.0, "plain"), (128, 1, 1.0, "batch x 4"), (32, 4, 1.0, "4 accumulated"),
        (32, 1, 0.5, "16-bit gradients"), (128, 4, 0.5, "all three"),
    ):  # fmt: skip
        for link, bandwidth in LINKS.items():
            cells = []
            for n in (8, 64, 512):
                alone = paper_step(micro, 1, 1.0, k)
                cells.append(guess(alone / paper_step(micro, n, bandwidth, k, size), 2))
            rows.append([how, link, *cells])
    speed = Speed(read("training_speed"))
    exchanges = [speed.exchange(2, rows) for rows in (8, 32, 128)]
    last = exchanges[-1]
    even = 2 * 30522 / last["touched"]
    return [
        "## Past one machine, on paper", "",
        f"Efficiency (n GPUs over n times one) predicted for GPUs that compute at "
        f"{PAPER['rate'] / 1e12:.0f} TFLOP/s with {1e3 * PAPER['fixed']:.0f} ms a step for the "
        f"optimizer and launches, a ring over links at their nominal rate, "
        f"{1e6 * LINK_LATENCY:.0f} µs a message. No real NVLink joins 512 GPUs; the row shows "
        "what latency alone would do there.", "",
        *table(["32 rows a GPU, and", "link", "8 GPUs", "64 GPUs", "512 GPUs"], rows),
        "A larger batch gives backward more time to hide the same bytes behind, accumulation pays "
        "for them once in four, 16-bit gradients halve them. A ring's latency grows with the "
        "number of GPUs, whatever the bytes; NCCL takes a tree there, so the last column is the "
        "worst case.", "",
        "Efficiencies that others published:", "",
        *table(["what", "efficiency", "source"], [list(one) for one in PUBLISHED]),
        "### Only the embeddings' rows that were touched", "",
        f"{100 * WORDS / sum(buckets()):.0f} % of the gradients' bytes are word embeddings, and a "
        "step touches few of the 30,522 rows. Gathering only those is exact. Measured on the two "
        "CPU processes above:", "",
        *table(["rows of each process", "words touched", "all-reduce of all rows, ms",
                "exchange of the touched, ms"],
               [[f"{one['rows']:.0f}", f"**{one['touched']:,.0f}**",
                 f"**{1e3 * one['dense']:.1f}**", f"**{1e3 * one['sparse']:.1f}**"]
                for one in exchanges]),
        f"A gather receives from every other rank, an all-reduce about twice the table whatever "
        f"their number: at {last['rows']:.0f} rows each they meet at about {even:.0f} ranks.", "",
    ]  # fmt: skip


def ddp_page() -> str:
    page = head("Two processes with DDP, measured", [path.stem for path in speed_records()])
    names = [name.replace("one T4", "two T4s") for name in single_hosts()]
    plain = [2 * t4_step(32) / t4_step(32, 2, case=(1, 1, i)) for i in range(3)]
    rates = [64 / t4_step(32, 2, case=(1, 1, i)) for i in range(3)]
    minutes = [EPOCH_ROWS / rate / 60 for rate in rates]
    strongs = [t4_step(64) / t4_step(32, 2, case=(1, 1, i)) for i in range(3)]
    h200 = "`bash training/run_ddp.sh` on two"

    def epoch(speed):
        return f"**{spread([EPOCH_ROWS / r / 60 for r in speed.scripts('ddp')])}**"

    page += table(["`train_ddp.py`, two processes, 32 rows each", *names], [
        row("strong speed-up: same global batch",
            lambda speed: f"**{spread(strong(speed, middle(speed))[0], 2)}** at "
            f"{2 * middle(speed)} rows",
            guess(strongs[1], 2, "", strongs) + " at 64 rows", h200),
        row("weak speed-up: same batch in each process",
            lambda speed: f"**{spread(weak(speed, middle(speed))[0], 2)}** at "
            f"{middle(speed)} rows",
            guess(plain[1], 2, "", plain) + " at 32 rows", h200),
        row("samples/s", lambda speed: f"**{spread(speed.scripts('ddp'))}**",
            guess(rates[1], 0, "", rates), h200),
        row("minutes an epoch of AG News, 114,000 rows", epoch,
            guess(minutes[1], 1, "", minutes), h200),
        row("over two processes without communication",
            lambda speed: f"**{spread(speed.script_ratio('ddp', 'two_apart'), 2)}**", h200=h200),
        row("peak memory of rank 0, MiB",
            lambda speed: f"**{spread(speed.scripts('ddp', 'peak_memory_mb'), 0)}**", h200=h200),
    ])  # fmt: skip
    page += ["## Accuracy", "",
             *accuracy_rows("train_single", "train_ddp"),
             "The same recipe and global batch: DDP is the same mathematics, and what differs is "
             "the order of the rows and of the sums. The times were taken while the machine did "
             "other work too, and say nothing of speed.", ""]  # fmt: skip
    for host, speed in records().items():
        if 2 in speed.world_sizes:
            page += host_sections(host, speed)
    page += [*kaggle_section(), *paper_section()]
    return "\n".join(page).rstrip() + "\n"


# Plots


def slug(host: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in host.lower()).strip("_")


def plots() -> dict[str, bytes]:
    """File name -> SVG; the same bytes from the same records."""
    drawn = {"throughput.svg": throughput_plot()}
    for host, speed in records().items():
        if 2 in speed.world_sizes:
            drawn[f"waterfall_{slug(host)}.svg"] = waterfall_plot(host, speed)
            drawn[f"predicted_{slug(host)}.svg"] = predicted_plot(host, speed)
    return drawn


def figure(width: float, height: float):
    import matplotlib

    matplotlib.use("svg")
    # words as text, not outlines; names inside the file that do not change from run to run
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "distrinews",
                            "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    from matplotlib import pyplot

    pyplot.close("all")
    return pyplot.subplots(figsize=(width, height), layout="constrained")


def svg(drawing) -> bytes:
    import io

    file = io.BytesIO()
    drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def waterfall_plot(host: str, speed: Speed) -> bytes:
    micro, way = steps_of_the_way(speed)
    drawing, axes = figure(8, 3.6)
    level = 0.0
    for place, (name, seconds) in enumerate(way):
        total = name in ("one process", "ideal share", "DDP, measured")
        start = 0.0 if total else level
        level = seconds if total else level + seconds
        axes.barh(place, 1e3 * seconds, left=1e3 * start, color="#4477aa" if total else "#cc6677")
        axes.text(1e3 * max(start, start + seconds), place, f" {1e3 * seconds:,.0f}", va="center")
    axes.set_yticks(range(len(way)), [name for name, _ in way])
    axes.invert_yaxis()
    axes.set_xlabel(f"ms of a step at global batch {2 * micro}")
    axes.set_title(host, fontsize=10)
    return svg(drawing)


def predicted_plot(host: str, speed: Speed) -> bytes:
    drawing, axes = figure(5, 4)
    for launch, colour in zip(map(str, speed.world_sizes), ("#4477aa", "#cc6677", "#228833"),
                              strict=False):  # fmt: skip
        pairs = [(median(one["step"]), guessed) for at, one, guessed in compared(speed)
                 if at == launch]  # fmt: skip
        axes.scatter(*zip(*pairs, strict=True), color=colour,
                     label=f"{launch} process{'es' * (launch != '1')}")  # fmt: skip
    ends = axes.get_xlim()
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.set_xlabel("step measured, s")
    axes.set_ylabel("step predicted, s")
    axes.legend(frameon=False)
    axes.set_title(host, fontsize=10)
    return svg(drawing)


def throughput_plot() -> bytes:
    speeds = records()
    drawing, axes = figure(7, 3.6)
    for host, speed in speeds.items():
        for launch, variant, name in (("1", "single", "one device"), ("2", "ddp", "DDP on two"),
                                      ("all cores", "single", "all cores")):  # fmt: skip
            if launch not in speed.rounds[0]["pieces"]:
                continue
            micros = speed.micros(launch, variant)
            processes = 2 if launch == "2" else 1
            rates = [processes * micro / median(speed.find(launch, variant, micro)["step"])
                     for micro in micros]  # fmt: skip
            axes.plot(micros, rates, marker="o", label=f"{name}, {host}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows of each process")
    axes.set_ylabel("samples/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7)
    return svg(drawing)
