"""How fast training is here, whole and in pieces, in one process and in several.

python -m benchmarks.bench_training [--quick] [--record] [--device cpu|cuda] [--minutes 60]

DistilBERT-base with random weights (speed does not depend on their values), or another --model;
real text lengths, from AG_NEWS_DIR or else the sample. A round runs everything once: the real
scripts, transformers' Trainer, and step_pieces.py for every world size, so that noise affects all
alike; then again, three times at most, as the minutes allow. A device is a GPU, or an equal share
of the CPU's cores. Trainer's best flags are searched first, over a small grid.
The record, one flat row a measurement, goes to runs/, with --record to benchmarks/results/.
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 makes a CPU with AMX compute as one without.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from benchmarks.cost_model import flops_per_sample
from benchmarks.figures import PLAIN, RESULTS, ROOT, Speed, record_header, write_record
from training import errors, machine, utils
from training.ag_news import SourceError, find_data
from training.dataset import DataError, prepare_data
from training.model import ModelError, find_backbone, packaged_backbone, read_config

BATCH = 32  # rows of a process's step in the real scripts and in Trainer
GRID = {
    "bf16": [True, False],
    "train_sampling_strategy": ["group_by_length", "random"],
    "optim": ["adamw_torch_fused", "adamw_torch"],
}


def make_backbone(folder: Path) -> Path:
    """DistilBERT-base's shape with random weights, its tokenizer from the packaged backbone."""
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    DistilBertModel(DistilBertConfig()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(packaged_backbone() / name, folder)
    return folder


def settings(world_size: int, precision: str, cuda: bool, quick: bool) -> list[dict]:
    """What step_pieces.py measures in a launch of `world_size` processes."""
    # The largest first: the others reuse the memory that it took. The cost model is calibrated on
    # 16, 64 and 128 rows; 12, 24, 48, 96 and 3 accumulations were added after that rule was fixed.
    long, quick = not quick, quick and not cuda  # a GPU measures all batches, in fewer steps
    batches = (16, 8) if quick else (128, 96, 64, 48, 32, 24, 16, 12, 8)
    accumulations = (2,) if quick else (2, 3, 4)
    middle = 16 if quick else 32  # a process's share in the waterfall
    variant = "single" if world_size == 1 else "ddp"
    chosen = [{"variant": variant, "micro": micro} for micro in batches]
    chosen += [{"variant": variant, "micro": 16, "accumulation": k} for k in accumulations]
    if world_size == 1:
        doubled = {2 * micro for micro in batches} - {*batches}  # the global batches of two
        chosen = [{"variant": "single", "micro": micro} for micro in sorted(doubled)[::-1]] + chosen
        if cuda:
            chosen += [{"variant": "single", "micro": 32, "precision": "fp32"}]
        if cuda and long:  # compiling would take most of the time
            chosen += [{"variant": "single", "micro": 32, "compiled": True}]
    else:
        known = (8, 16) if quick else (16, 32, 64, 128)
        levers = [{"compression": "bf16"}, {"compression": "fp16"}, {"sparse_embeddings": True}]
        chosen += [{"variant": "no_sync", "micro": micro} for micro in known]
        chosen += [{"variant": "no_communication", "micro": middle}]
        chosen += [
            {"variant": "ddp", "micro": micro} | lever
            for lever in (levers[::2] if quick else levers)
            for micro in ((8,) if quick else (8, 32))
        ]
    steps = (30 if long else 10) if cuda else 1 if quick else 3
    same = PLAIN | {"compiled": False, "precision": precision, "steps": steps}
    return [same | one for one in chosen]


def samples_per_second(record: dict, warm_up: int) -> dict:
    """The rate of a run's steps after the first `warm_up`, from its curve, and their number."""
    seconds, first, before = 0.0, None, 0
    for point in record["curve"]:  # a point's rate covers the steps since the one before
        if before >= warm_up:
            first = before if first is None else first
            rows = (point["step"] - before) * record["global_batch_size"]
            seconds += rows / point["samples_per_second"]
        before = point["step"]
    rate = (before - first) * record["global_batch_size"] / seconds
    return {"samples_per_second": rate, "steps": before - first, "warm_up": first}


class Bench:
    """Starts what is measured; `devices` GPUs, or shares of the cores with `threads` each."""

    def __init__(self, backbone: Path, source: str, folder: Path, cuda, devices: int, quick: bool):
        self.backbone, self.source, self.folder = backbone, source, folder
        self.cuda, self.devices, self.quick, self.started = cuda, devices, quick, []
        self.threads = max(1, machine.cores() // devices)
        self.cores = self.threads * devices
        # our scripts: long enough for an estimate of an epoch; comparisons: long enough for a ratio
        self.long, self.short, self.warm_up = (340, 340, 20) if cuda else (50, 20, 10)
        if quick and not cuda:
            self.long, self.short, self.warm_up = 6, 6, 2

    def start(self, command: list, threads: int, gpus: range) -> subprocess.Popen:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.devices))))
        visible = ",".join(seen.split(",")[gpu] for gpu in gpus) if self.cuda else ""
        env = {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": visible,
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        }
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, *map(str, command)]
        self.started.append(subprocess.Popen(command, cwd=self.folder, env=os.environ | env, **how))
        return self.started[-1]

    def finish(self, process: subprocess.Popen) -> str:
        try:
            out, _ = process.communicate()
        except KeyboardInterrupt:
            for one in self.started:  # two may train side by side
                one.terminate()
            raise
        if process.returncode:
            raise SystemExit(f"{out}\nerror: {shlex.join(map(str, process.args))} failed")
        return out

    def launch(self, world_size: int) -> list:
        if world_size == 1:
            return []
        launcher = ROOT / "training" / "torchrun.py"
        return [launcher, "--standalone", "--nproc-per-node", world_size]

    def script(self, world_size: int, threads: int, steps: int, name: str, *flags, device=0):
        """Starts a real script, BATCH rows per process; what is returned waits for its figures."""
        report, batch = self.folder / f"{name}.json", world_size * BATCH
        script = ROOT / "training" / ("train_ddp.py" if world_size > 1 else "train_single.py")
        flags = [*flags, "--model", self.backbone, "--data", self.source, "--fresh"]
        if self.source != "sample":
            flags += ["--max-train-samples", steps * batch + 64]
        flags += ["--max-eval-samples", 8, "--epochs", 1000, "--max-steps", steps]
        flags += ["--global-batch-size", batch, "--micro-batch-size", BATCH, "--save-every", 10**6]
        flags += ["--checkpoint-dir", self.folder / name, "--report", report]
        gpus = range(device, device + world_size)
        process = self.start([*self.launch(world_size), script, *flags], threads, gpus)

        def wait() -> dict:
            self.finish(process)
            record = json.loads(report.read_text())
            figures = samples_per_second(record, self.warm_up)
            more = {name: record[name] for name in ("precision", "peak_memory_mb")}
            return {"kind": "script", "name": name} | figures | more

        return wait

    def one(self, *args) -> list[dict]:
        return [self.script(*args)()]

    def trainer(self, name: str, flags: dict, steps: int, kind="script") -> list[dict]:
        more = ["--pad-to-max"] if name == "naive" else []
        warm_up = min(self.warm_up, steps // 2)
        command = ["-m", "benchmarks.trainer_baseline", self.backbone, self.source, steps, warm_up]
        process = self.start([*command, json.dumps(flags), *more], self.cores, range(1))
        figures = json.loads(self.finish(process).splitlines()[-1])
        precision = next((p for p in ("bf16", "fp16") if flags.get(p)), "fp32")
        row = {"kind": kind, "name": name, "precision": precision, "flags": json.dumps(flags)}
        return [row | figures | {"steps": steps - warm_up, "warm_up": warm_up}]

    def search(self, precision: str, rows: list[dict]) -> None:
        """Adds Trainer with every combination of GRID in this precision and in fp32."""
        steps = 100 if self.cuda else 10
        for half, *others in itertools.product(*GRID.values()):
            flags = {precision: True} if half and precision != "fp32" else {}
            flags |= dict(zip(list(GRID)[1:], others, strict=True))
            if half or precision != "fp32":
                rows += self.trainer("grid", flags, steps, kind="grid")

    def pieces(self, launch: str, world_size: int, threads: int, precision: str) -> list[dict]:
        chosen = settings(world_size, precision, self.cuda, self.quick)
        plan, out = self.folder / "plan.json", self.folder / "out.json"
        what = {"backbone": str(self.backbone), "source": self.source, "precision": precision}
        plan.write_text(json.dumps(what | {"settings": chosen}))
        command = [*self.launch(world_size), "-m", "benchmarks.step_pieces", plan, out]
        self.finish(self.start(command, threads, range(world_size)))
        return [{"launch": launch, "threads": threads} | row for row in json.loads(out.read_text())]

    def parts(self, precision: str, best: dict[str, dict]) -> list[tuple[str, float, Callable]]:
        """A round: (what, about how many seconds, the call that returns rows)."""
        cores, long, short = self.cores, self.long, self.short
        parts = [("train_single.py", long, partial(self.one, 1, cores, long, "single"))]
        for name, flags in best.items():
            steps = long if name == "trainer_best" else short  # as many as what it is compared with
            seconds = steps * (2.5 if "best" in name else 5)
            parts.append((f"Trainer, {name}", seconds, partial(self.trainer, name, flags, steps)))
        if precision != "fp32" and not self.quick:
            call = partial(self.one, 1, cores, short, "single_fp32", "--precision", "fp32")
            parts.append(("train_single.py in fp32", 3.2 * short, call))
        if self.devices > 1:
            call = partial(self.one, 2, self.threads, long, "ddp")
            parts.append(("train_ddp.py", 1.3 * long, call))
            if not self.quick:
                what = "two processes without communication"
                parts.append((what, 1.7 * short, self.no_communication))
        launches = [(str(n), n, self.threads) for n in range(1, self.devices + 1)]
        if self.devices > 1 and not (self.cuda or self.quick):  # one process with all cores
            launches.append(("all cores", 1, cores))
        for launch in launches:
            call = partial(self.pieces, *launch, precision)
            parts.append((f"pieces of a step, {launch[0]}", 30 if self.quick else 150, call))
        # on a GPU nearly all the time goes into starting; on a CPU these fit two cores
        return [(name, 30 if self.cuda else seconds, call) for name, seconds, call in parts]

    def no_communication(self) -> list[dict]:
        """Two processes that train side by side; their rates together."""
        runs = [self.script(1, self.threads, self.short, f"alone{n}", device=n) for n in range(2)]
        rows = [wait() for wait in runs]
        total = sum(row["samples_per_second"] for row in rows)
        return [rows[0] | {"name": "no_communication", "samples_per_second": total}]


def best_flags(rows: list[dict], precision: str) -> dict[str, dict]:
    """What Trainer runs with in each round: {name: flags}; best in our precision, and in fp32."""
    best = {"trainer_defaults": {}}
    for name, kind in (("trainer_best", precision), ("trainer_best_fp32", "fp32")):
        tried = [row for row in rows if row["precision"] == kind]
        if name == "trainer_best" or precision != "fp32":
            fastest = max(tried, key=lambda row: row["samples_per_second"])
            best[name] = json.loads(fastest["flags"])
    return best | {"naive": {}}


def run_rounds(bench: Bench, precision: str, minutes: float) -> tuple[list[dict], int, str]:
    """(the rows, the number of full rounds, what ended the measurement early): an hour of it is not
    lost to a failure or Ctrl-C. Rows of a part of a round are kept if there was no full one."""
    t0, best, rows, full, ended = time.perf_counter(), {}, [], 0, ""
    rounds = 1 if bench.quick else 3
    progress = tqdm(total=1, unit="s")
    try:
        if not bench.quick:  # Trainer alone would take as long as the rest
            progress.set_description("Trainer's flags: a grid")
            bench.search(precision, rows)
            best = best_flags(rows, precision)
        parts, began = bench.parts(precision, best), time.perf_counter()
        progress.reset(rounds * sum(weight for _, weight, _ in parts))
        for number in range(rounds):
            for name, weight, call in parts:
                progress.set_description(f"round {number + 1} of {rounds}: {name}")
                rows += [{"round": number} | row for row in call()]
                progress.update(weight)
            full = number + 1
            each = (time.perf_counter() - began) / full
            if time.perf_counter() - t0 + each > 60 * minutes:
                break
    except (SystemExit, KeyboardInterrupt) as end:
        ended = str(end) or "error: stopped"
        rows = [row for row in rows if not full or row.get("round") != full]
    progress.close()
    return rows, full, ended


def stop(number: int, frame) -> None:
    """Ends what is measured, once: `timeout` sends its signal twice."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="one small round without Trainer, about three minutes")
    add("--record", action="store_true", help="write to benchmarks/results/ for make report")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--model", default="base", help="packaged, a name or a folder (default: random weights)")
    add("--minutes", type=float, default=60, help="start no round that would end later")
    add("--out", type=Path, help="write to this file instead")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise utils.UsageError("--device cuda needs a GPU, and none is visible; use --device cpu")
    cuda = torch.cuda.is_available() and args.device != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    devices = min(2, torch.cuda.device_count() if cuda else machine.cores())
    precision, reason = utils.choose_precision("auto", device)
    # the best 16-bit arithmetic of this CPU, which decides its speed
    found = re.search("amx_bf16|avx512_bf16|no bf16", reason)
    instructions = found[0] if found else "" if cuda else "unknown"
    source = os.environ.get("AG_NEWS_DIR", "sample")
    source = source if source == "sample" else str(Path(source).resolve())
    load = os.getloadavg()[0]
    if load > 0.5:
        text = "other programs are running; the figures will be too low, and their ratios wrong"
        print(f"warning: load average {load:.1f}: {text}", file=sys.stderr)
    header, t0 = record_header(device), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        backbone, model = Path(folder) / "backbone", "DistilBERT-base, random weights"
        if args.model == "base":
            make_backbone(backbone)
        else:
            backbone, model, _ = find_backbone(args.model)
        config = read_config(json.loads((backbone / "config.json").read_text()))
        lengths = prepare_data(find_data(source), backbone, 128, None, 8).train.lengths
        flops = fmean(flops_per_sample(config, int(tokens)) for tokens in lengths)
        bench = Bench(backbone.resolve(), source, Path(folder), cuda, devices, args.quick)
        rows, full, ended = run_rounds(bench, precision, args.minutes)
    record = header | {
        "instructions": os.environ.get("ONEDNN_MAX_CPU_ISA", instructions),
        "load_average": load,
        "device": device.type,
        "devices": devices,
        "minutes": (time.perf_counter() - t0) / 60,
        "data": source if source == "sample" else f"folder {Path(source).name}",
        "model": model,
        "config": asdict(config),
        "precision": precision,
        "batch": BATCH,
        "mean_tokens": float(lengths.mean()),
        "gflop_per_sample": flops / 1e9,
        "rows": rows,
    }
    folder, name = ROOT / "runs", "quick" * args.quick if full else "unfinished"
    if full and args.record:
        folder, name = RESULTS, Speed(record).slug
    out = args.out or folder / f"training_speed{name and '_'}{name}.json"
    write_record(out, record, rows)
    if full:
        print(Speed(record).summary())
    print(f"wrote {out}")
    if ended:
        sys.exit(ended)


if __name__ == "__main__":
    with errors.one_line_errors(ModelError, SourceError, DataError, utils.UsageError):
        main()
