"""What a record of bench_training.py says: figures over its rounds, and the cost model's inputs.

A figure is a pandas Series with one value per round; a ratio is taken within each round. A figure
that was not measured is an empty Series, which a page shows as the command that would measure it.
"""

import json
import math
import re
import shlex
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pandas as pd

from benchmarks.cost_model import Pieces, step, waterfall
from training import machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ENOUGH_STEPS = 40  # behind an estimate of an epoch
FIGURES = ["data", "compute", "update", "sync_flags", "step", "tokens", "imbalance"]
PLAIN = {"accumulation": 1, "compression": "none", "sparse_embeddings": False}
SETTING = ["variant", "micro", *PLAIN]
# measured after the rule of calibration() was fixed, to see how far off the cost model is
VALIDATION = {"micro": {12, 24, 48, 96, 192}, "accumulation": {3}}


def read(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def record_header(device=None) -> dict:
    """What every record of a `python -m ...` begins with: what ran, when, where, on what."""
    module = sys.modules["__main__"].__spec__.name
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "started": datetime.now().isoformat(timespec="seconds"),
        "host": machine.host(device),
        "versions": machine.versions(),
        "git_commit": machine.git_commit(),
    }


def write_record(path: Path, record: dict, rows: list[dict] | None = None) -> None:
    """A record with its flat rows, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows or [])
    header = json.dumps(record | ({} if rows is None else {"rows": []}), indent=1)
    path.write_text(header.replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n")


def where(rows: pd.DataFrame, **columns) -> pd.DataFrame:
    """The rows that have these values, by round."""
    for name, value in columns.items():
        rows = rows[rows[name] == value]
    return rows.set_index("round")


def short(host: str) -> str:
    return re.sub(r"\(R\)|\(TM\)| Processor| CPU", "", host)


def describe(setting: pd.Series) -> str:
    text = f"{setting.micro} rows"
    text += f", {setting.accumulation} accumulated" if setting.accumulation > 1 else ""
    text += f", sent as {setting.compression}" if setting.compression != "none" else ""
    return text + (", sparse embeddings" if setting.sparse_embeddings else "")


class Speed:
    """A host's record. `launch` is "1", "2" (processes, a device each) or "all cores"."""

    def __init__(self, record: dict):
        self.record = record
        self.rows = pd.DataFrame(record["rows"]).rename(columns={"name": "name_"})
        if "flags" not in self.rows:  # a quick round is without Trainer
            self.rows["flags"] = None
        self.cuda = record["device"] == "cuda"
        self.commit = (record.get("git_commit") or "unknown")[:7]
        self.launches = list(self.rows.launch.dropna().unique())
        self.ddp = "2" in self.launches
        self.count = int(self.rows["round"].max()) + 1
        self.title = short(record["host"])
        self.title += f", {record['instructions']}" if record["instructions"] else ""
        self.slug = "".join(c if c.isalnum() else "_" for c in self.title.lower()).strip("_")
        threads = int(self.rows.threads.dropna().iloc[0])
        self.device = "a GPU" if self.cuda else f"{threads} core{'s' * (threads > 1)}"
        plain = self.rows[(self.rows.kind == "step") & (self.rows.precision == record["precision"])]
        self.steps = plain[~plain.compiled.astype(bool)].astype({"micro": int, "accumulation": int})

    # the real scripts

    def script(self, name: str, figure: str = "samples_per_second") -> pd.Series:
        return where(self.rows, kind="script", name_=name)[figure]

    def ratio(self, name: str, other: str) -> pd.Series:
        return (self.script(name) / self.script(other)).dropna()

    def script_steps(self, name: str) -> int:
        return int(self.script(name, "steps").min()) if len(self.script(name)) else 0

    def epoch_minutes(self, name: str, rows: int) -> pd.Series:
        """An estimate, where enough steps were measured."""
        rate = self.script(name)
        return rows / rate / 60 if self.script_steps(name) >= ENOUGH_STEPS else rate[:0]

    def flags(self, name: str) -> str:
        return self.script(name, "flags").iloc[0] if len(self.script(name)) else "{}"

    def trainer_flags(self) -> str:
        """What Trainer ran with in our precision."""
        if len(self.grid()):
            return "its best flags"
        flags = json.loads(self.flags("trainer_best") or "{}").values()
        words = [f"`{value}`" for value in flags if isinstance(value, str)]
        return f"{' and '.join(words) or 'its defaults'} (not searched)"

    def grid(self) -> pd.DataFrame:
        """Every combination of Trainer's flags that was tried, the fastest first."""
        rows = self.rows[self.rows.kind == "grid"]
        rows = rows.sort_values("samples_per_second", ascending=False)
        return rows.assign(flags=[json.loads(flags) for flags in rows["flags"]])

    def matmul_share(self) -> pd.Series:
        """What train_single.py reaches of the matmul throughput of the cores it has."""
        launch = "2" if self.ddp and not self.cuda else "1"  # on a CPU, all cores at work
        flop = self.record["gflop_per_sample"] * 1e9
        return (self.script("single") * flop / self.matmuls(launch)).dropna()

    def matmuls(self, launch: str) -> pd.Series:
        return self.piece("gemm", launch).flops

    # the pieces of a step

    def piece(self, kind: str, launch: str) -> pd.DataFrame:
        return where(self.rows, kind=kind, launch=launch)

    def settings(self, launch: str) -> list[tuple[pd.Series, pd.DataFrame]]:
        """(a setting, its rounds), in the order in which they were measured."""
        found = where(self.steps, launch=launch).groupby(SETTING, sort=False)
        return [(rows.iloc[0], rows) for _, rows in found]

    def find(self, launch: str, variant: str, micro: int, **how) -> pd.DataFrame:
        """The rounds of a setting, PLAIN but for `how`; an empty frame if it was not measured."""
        return where(self.steps, launch=launch, variant=variant, micro=micro, **(PLAIN | how))

    def micros(self, launch: str, variant: str) -> list[int]:
        """The batch sizes at which a variant was measured, as it is."""
        rows = where(self.steps, launch=launch, variant=variant, **PLAIN)
        return sorted(rows.micro.unique().tolist())

    def calibration(self, launch: str) -> list[int]:
        """The batch sizes without communication from which the cost model learns what compute
        costs: 16, 64 and 128 rows and the largest, beyond which no line is drawn (one process's
        time from 64 to 256 rows has been no straight line); of a quick record the ends."""
        micros = self.micros(launch, "no_sync" if launch == "2" else "single")
        return sorted({16, 64, 128, micros[-1]} if 64 in micros else {micros[0], micros[-1]})

    def pieces(self, launch: str, compression: str = "none") -> Pieces:
        """The cost model's inputs, from the calibration and the microbenchmarks alone."""
        variant = "no_sync" if launch == "2" else "single"
        rounds = [self.find(launch, variant, micro) for micro in self.calibration(launch)]
        known = pd.DataFrame([rows[FIGURES].median() for rows in rounds])
        compute = tuple(sorted(zip(known.tokens, known.compute, strict=True)))
        inputs = compute, known["update"].median(), known.data.sum() / known.tokens.sum()
        if launch != "2":
            return Pieces(*inputs, 0, 0)
        imbalance = pd.concat(rows.imbalance / rows.compute for rows in rounds).median()
        seconds = self.buckets()[compression]
        sizes = tuple(seconds.index.get_level_values("bytes"))
        sync_flags = self.piece("sync_flags", launch).seconds.median()
        config = self.record["config"]
        words = config["vocab_size"] + config["max_position_embeddings"]
        buckets = sizes, tuple(seconds), 4.0 * config["dim"] * words
        return Pieces(*inputs, sync_flags, imbalance, *buckets, self.cuda)

    def buckets(self) -> pd.DataFrame:
        """Seconds of each bucket's all-reduce alone, in the order of filling: its number and bytes
        are the index, the compressions the columns."""
        rows = self.piece("bucket", "2")
        table = rows.pivot_table("seconds", ["number", "bytes"], "compression", "median")
        return table.filter(["none", "bf16", "fp16"])

    def exchange(self, micro: int) -> pd.Series:
        """Touched rows and seconds of sharing the word embeddings' gradient of so many rows."""
        rows = where(self.rows, kind="embeddings", launch="2", micro=micro)
        return rows[["touched", "dense_seconds", "sparse_seconds"]].median()

    def predicted(self, launch: str, rows: pd.DataFrame) -> float:
        """Seconds of a setting's step; of its own measurement only the padded tokens are used."""
        if rows.empty:
            return math.nan
        setting = rows.iloc[0]
        pieces = self.pieces(launch, setting.compression)
        if setting.sparse_embeddings:
            *others, last = pieces.seconds
            saved = self.exchange(setting.micro)
            last += saved.sparse_seconds - saved.dense_seconds
            pieces = replace(pieces, seconds=(*others, last))
        return step(pieces, rows.tokens.iloc[0], setting.accumulation)

    # one process against two

    def strong(self, micro: int) -> pd.Series:
        """One process over two at the same global batch, 2 x micro."""
        one, two = self.find("1", "single", 2 * micro), self.find("2", "ddp", micro)
        return (one.step / two.step).dropna()

    def weak(self, micro: int, accumulation=1, **how) -> pd.Series:
        """Samples/s of two processes over those of one, each with `micro` rows of its own."""
        one = self.find("1", "single", micro, accumulation=accumulation)
        two = self.find("2", "ddp", micro, accumulation=accumulation, **how)
        return (2 * one.step / two.step).dropna()

    def drift(self) -> float:
        """By how many per cent the machine was faster for two processes than for one, if it was."""
        alone = self.find("1", "single", self.middle).step.median()
        return -100 * self.waterfall()["contention for the machine"] / alone

    def predicted_strong(self, micro: int) -> float:
        one = self.predicted("1", self.find("1", "single", 2 * micro))
        return one / self.predicted("2", self.find("2", "ddp", micro))

    def predicted_weak(self, micro: int, accumulation=1, **how) -> float:
        one = self.predicted("1", self.find("1", "single", micro, accumulation=accumulation))
        two = self.find("2", "ddp", micro, accumulation=accumulation, **how)
        return 2 * one / self.predicted("2", two)

    def best_weak(self) -> int:
        return max(self.micros("2", "ddp"), key=lambda micro: self.weak(micro).median())

    def levers(self) -> list[tuple[str, pd.Series, float]]:
        """(what, weak speed-up, predicted) of accumulation, compression, sparse embeddings."""
        found = []
        for setting, _ in self.settings("2"):
            how = setting[[*PLAIN]].to_dict()
            if setting.variant == "ddp" and how != PLAIN:
                weak = self.weak(setting.micro, **how), self.predicted_weak(setting.micro, **how)
                found.append((describe(setting), *weak))
        return found

    def contention(self, micro: int) -> float:
        """Forward and backward in two processes at once over those of one process alone."""
        two, one = self.find("2", "no_sync", micro), self.find("1", "single", micro)
        return (two.compute / one.compute).median()

    @property
    def middle(self) -> int:
        """The rows of each process at which the waterfall was measured; 0 with one device."""
        return next(iter(self.micros("2", "no_communication")), 0)

    def waterfall(self) -> dict[str, float]:
        micro = self.middle
        found = [self.find("1", "single", 2 * micro), self.find("1", "single", micro)]
        found += [self.find("2", how, micro) for how in ("no_communication", "no_sync", "ddp")]
        return waterfall(*({"world_size": 2} | rows[FIGURES].median().to_dict() for rows in found))

    def compared(self) -> pd.DataFrame:
        """Every setting that the cost model was not calibrated on: step, predicted, error."""
        rows = []
        for launch in ("1", "2") if self.ddp else ("1",):
            for setting, rounds in self.settings(launch):
                plain = setting.accumulation == 1 and setting.variant == "single"
                if setting.variant not in ("single", "ddp") or (
                    plain and setting.micro in self.calibration(launch)
                ):
                    continue
                predicted = self.predicted(launch, rounds)
                error = predicted / rounds.step.median() - 1
                new = any(setting[name] in values for name, values in VALIDATION.items())
                rows.append((launch, describe(setting), rounds.step, predicted, error, new))
        return pd.DataFrame(rows, columns="launch what step predicted error new".split())

    def errors(self) -> tuple[pd.Series, pd.Series]:
        """Of the settings known when the calibration was chosen, and of those added later."""
        table = self.compared()
        return table[~table.new].error.abs(), table[table.new].error.abs()

    def summary(self) -> str:
        """What `make bench` prints at the end."""
        rates = self.rows[self.rows.kind == "script"].groupby("name_", sort=False)
        table = rates.samples_per_second.agg(["median", "min", "max"]).round(1)
        text = f"\n{self.title}: samples/s\n{table.rename_axis(None).to_string()}\n"
        for micro in self.micros("2", "ddp"):
            strong, weak = self.strong(micro).median(), self.weak(micro).median()
            text += f"{micro} rows per process: strong scaling {strong:.2f}, weak {weak:.2f}\n"
        for failed in self.rows[self.rows.kind == "failed"].itertuples():
            text += f"not measured: {failed.name_} ({failed.error})\n"
        return text


def speeds() -> list[Speed]:
    """Every host's record: the one of most rounds first, of equally many the newest."""
    found = [Speed(read(path.stem)) for path in RESULTS.glob("training_speed*.json")]
    return sorted(found, key=lambda s: (s.count, s.record["started"]), reverse=True)


def runs(*scripts: str, folder: str = ".") -> dict[str, dict]:
    """The run records of the training scripts on AG News."""
    names = sorted(path.stem for path in (RESULTS / folder).glob("*.json"))
    found = {name: read(f"{folder}/{name}") for name in names if name != "sample_on_agnews"}
    found = {name: run for name, run in found.items() if isinstance(run, dict)}
    return {name: run for name, run in found.items() if run.get("script") in scripts}


def standard_error(run: dict) -> float:
    """Of a test accuracy, in points."""
    right = run["test_accuracy"]
    return 100 * math.sqrt(right * (1 - right) / run["test_samples"])
