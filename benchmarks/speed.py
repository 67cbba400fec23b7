"""What a record of bench_training.py says: medians and ratios over its rounds, and the cost model.

A figure comes as the list of its rounds; a ratio is taken within each round.
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.cost_model import Pieces, step

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def key(setting: dict) -> tuple:
    """What tells a setting of step_pieces.py from the others of its launch."""
    return (
        setting["variant"], setting["micro"], setting.get("accumulation", 1),
        setting.get("compression", "none"), setting["precision"], setting.get("compiled", False),
        setting.get("sparse", False),
    )  # fmt: skip


class Speed:
    """A record, its rounds side by side. `devices` is the number of processes of a launch."""

    def __init__(self, record: dict):
        self.record, self.rounds = record, record["rounds"]
        self.cuda = record["device"] == "cuda"
        self.world_sizes = [int(n) for n in self.rounds[0]["pieces"] if n.isdigit()]

    def scripts(self, name: str, figure: str = "samples_per_second") -> list[float]:
        return [one["scripts"][name][figure] for one in self.rounds]

    def script_ratio(self, name: str, other: str) -> list[float]:
        pairs = zip(self.scripts(name), self.scripts(other), strict=True)
        return [one / two for one, two in pairs]

    def gemm_share(self) -> list[float]:
        """What train_single.py gets out of the GEMM rate of the cores it has."""
        launch = "1" if self.cuda else str(max(self.world_sizes))  # on a CPU, all cores at work
        flop = self.record["gflop_per_sample"] * 1e9
        rates = [one["pieces"][launch]["gemm"] for one in self.rounds]
        return [r * flop / gemm for r, gemm in zip(self.scripts("single"), rates, strict=True)]

    def settings(self, launch) -> list[dict]:
        """A launch's settings, each figure the list of its rounds."""
        merged = {}
        for one in self.rounds:
            for setting in one["pieces"][str(launch)]["settings"]:
                entry = merged.setdefault(key(setting), dict(setting) | dict.fromkeys(FIGURES))
                for figure in FIGURES:
                    entry[figure] = [*(entry[figure] or []), setting[figure]]
        return list(merged.values())

    def find(
        self, launch, variant: str, micro: int, accumulation=1, compression="none", sparse=False
    ) -> dict:
        precision = self.record["precision"]
        wanted = (variant, micro, accumulation, compression, precision, False, sparse)
        return next(one for one in self.settings(launch) if key(one) == wanted)

    def micros(self, launch, variant: str) -> list[int]:
        """The batch sizes at which a variant was measured, without accumulation or compression."""
        precision = self.record["precision"]
        rest = (1, "none", precision, False, False)
        plain = [one for one in self.settings(launch) if key(one)[2:] == rest]
        return sorted(one["micro"] for one in plain if one["variant"] == variant)

    def calibration(self, launch) -> list[dict]:
        """The settings without communication from which the cost model learns what compute costs:
        16, 64 and 128 rows and the largest, beyond which no line is drawn (one process's time from
        64 to 256 rows has been no straight line); of a quick record the ends.
        """
        variant = "single" if launch in (1, "1", "all cores") else "no_sync"
        micros = self.micros(launch, variant)
        chosen = {16, 64, 128, micros[-1]} if 64 in micros else {micros[0], micros[-1]}
        return [self.find(launch, variant, micro) for micro in sorted(chosen)]

    def pieces(self, launch, compression="none") -> Pieces:
        """The cost model's inputs, from the calibration settings and the microbenchmarks alone."""
        known = self.calibration(launch)
        tokens = [one["tokens"][0] for one in known]
        compute = tuple(sorted(zip(tokens, (median(one["compute"]) for one in known), strict=True)))
        update = median(median(one["update"]) for one in known)
        data = sum(median(one["data"]) for one in known) / sum(tokens)
        if launch in (1, "1", "all cores"):
            return Pieces(compute, update, data, 0, 0)
        lag = median(
            off / compute
            for one in known
            for off, compute in zip(one["imbalance"], one["compute"], strict=True)
        )
        launches = [one["pieces"][str(launch)] for one in self.rounds]
        seconds = [median(times) for times in zip(*(one["all_reduce"][compression]
                                                    for one in launches), strict=True)]  # fmt: skip
        agree = median(one["ladder"][0][1] for one in launches)
        config = self.record["config"]
        rows = config["vocab_size"] + config["max_position_embeddings"]
        embeddings = 4.0 * config["dim"] * rows
        return Pieces(compute, update, data, agree, lag, tuple(launches[0]["buckets"]),
                      tuple(seconds), embeddings, self.cuda)  # fmt: skip

    def exchange(self, launch, micro: int) -> dict:
        """{rows, touched, dense, sparse}: sharing the word embeddings' gradient, medians."""
        runs = [one["pieces"][str(launch)]["sparse_embeddings"] for one in self.rounds]
        found = [one for run in runs for one in run if one["rows"] == micro]
        return {name: median(one[name] for one in found) for name in found[0]}

    def predicted(self, launch, setting: dict) -> float:
        """Seconds of a setting's step; of its own measurement only the padded tokens are used."""
        pieces = self.pieces(launch, setting.get("compression", "none"))
        if setting.get("sparse"):
            *others, last = pieces.seconds
            saved = self.exchange(launch, setting["micro"])
            pieces = replace(pieces, seconds=(*others, last - saved["dense"] + saved["sparse"]))
        return step(pieces, setting["tokens"][0], setting.get("accumulation", 1))


FIGURES = ("data", "compute", "update", "agree", "step", "tokens", "imbalance", "peak_memory_mb")
