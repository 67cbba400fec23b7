"""The plots of the pages, as SVG on a white ground, so that they read on a dark page, too."""

import io
from statistics import median

from benchmarks.figures import ROOT, Speed, read, speeds

FOLDER = ROOT / "benchmarks" / "plots"
# Okabe and Ito's palette, which the colour-blind can tell apart; shapes and labels differ as well
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f"
LIGHT = "#f5c49a"
MARKERS = "osD^v"
RECIPE = ("global_batch_size", "lr", "total_steps", "seed")


def figure(width: float, height: float):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.fonttype": "none",  # words as text, not outlines
        "svg.hashsalt": "distrinews",  # the same names inside the file in every run
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    from matplotlib import pyplot

    pyplot.close("all")
    return pyplot.subplots(figsize=(width, height), layout="constrained", facecolor="white")


def svg(drawing) -> str:
    file = io.StringIO()
    drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def waterfall(speed: Speed) -> str:
    way = speed.waterfall()
    drawing, axes = figure(8, 3.6)
    level = 0.0
    for row, (name, seconds) in enumerate(way.items()):
        total = name in ("one process", "ideal share", "DDP, measured")
        start = 0.0 if total else level
        level = start + seconds
        axes.barh(row, 1e3 * seconds, left=1e3 * start, color=BLUE if total else ORANGE)
        axes.text(1e3 * max(start, level), row, f" {1e3 * seconds:,.0f}", va="center")
    axes.set_yticks(range(len(way)), list(way))
    axes.invert_yaxis()
    axes.set_xlabel(f"ms of a step at a global batch of {2 * speed.middle} rows (strong scaling)")
    axes.set_title(speed.title, fontsize=10)
    return svg(drawing)


def throughput() -> str:
    drawing, axes = figure(7.5, 4)
    styles = {
        "1": ("one process, one device", BLUE),
        "2": ("DDP, two devices", ORANGE),
        "all cores": ("one process, all cores", GREEN),
    }
    found = speeds()
    for number, speed in enumerate(found):
        for launch, (name, colour) in styles.items():
            variant, processes = ("ddp", 2) if launch == "2" else ("single", 1)
            micros = speed.micros(launch, variant)
            steps = [speed.find(launch, variant, micro).step.median() for micro in micros]
            rates = [processes * micro / step for micro, step in zip(micros, steps, strict=True)]
            if micros:
                style = {"marker": MARKERS[number % 5], "linestyle": ("-", "--", ":")[number % 3]}
                axes.plot(micros, rates, color=colour, label=f"{name}; {speed.title}", **style)
    axes.set_xscale("log", base=2)
    ticks = sorted({micro for speed in found for micro in speed.micros("1", "single")})
    axes.set_xticks(ticks, ticks, fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("rows of each process (weak scaling: the distance of orange from blue)")
    axes.set_ylabel("samples/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return svg(drawing)


class Curves:
    """The loss curves of one process and of two on the same recipe, if the records hold them."""

    def __init__(self, single: dict, ddp: dict):
        self.single, self.ddp = single, ddp
        losses = [{point["step"]: point["loss"] for point in run["curve"]} for run in (single, ddp)]
        common = losses[0].keys() & losses[1].keys()
        self.difference = median(abs(losses[0][step] - losses[1][step]) for step in common)

    def draw(self) -> str:
        drawing, axes = figure(8, 3.6)
        for run, colour, width in ((self.single, BLUE, 2.5), (self.ddp, ORANGE, 1)):
            steps, losses = zip(*((p["step"], p["loss"]) for p in run["curve"]), strict=True)
            processes = f"{run['world_size']} process{'es' * (run['world_size'] > 1)}"
            label = f"{run['script']}.py, {processes}"
            axes.plot(steps, losses, color=colour, linewidth=width, label=label)
        axes.set_xlabel(f"step, {self.ddp['global_batch_size']} rows each, the same on 1 and 2")
        axes.set_ylabel("training loss")
        axes.set_ylim(bottom=0)
        axes.legend()
        return svg(drawing)


def curves() -> Curves | None:
    found = [read(f"agnews_packaged_{name}") or {} for name in ("single", "ddp")]
    single, ddp = ([run.get(key) for key in RECIPE] for run in found)
    return Curves(*found) if all(run.get("curve") for run in found) and single == ddp else None


def draw() -> dict[str, str]:
    """{file name: SVG}, of what the records hold; None for what they lack."""
    found = speeds()
    drawn = {"loss.svg": curves() and curves().draw(), "throughput.svg": found and throughput()}
    for speed in found:
        drawn[f"waterfall_{speed.slug}.svg"] = speed.ddp and waterfall(speed)
    return drawn
