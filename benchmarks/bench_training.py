"""How fast training is here, whole and in pieces, in one process and in several.

python -m benchmarks.bench_training [--quick] [--device cpu|cuda] [--minutes 35] [--out FILE]

DistilBERT-base with random weights (speed does not depend on their values), or another --model;
real text lengths, from AG_NEWS_DIR or else the sample. A round runs everything once: the real
scripts, transformers' Trainer, and step_pieces.py for every world size, so that a noisy minute
strikes all; then again, three times at most, as the minutes allow. A device is a GPU, or an equal
share of the CPU's cores.
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 shows a CPU with AMX as one without.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import save_file

from benchmarks.cost_model import flops_per_sample
from training import errors, machine, utils
from training.dataset import DataError, prepare_data
from training.model import (
    Config,
    ModelError,
    NewsClassifier,
    find_backbone,
    packaged_backbone,
    read_config,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BATCH = 32  # rows of a process's step in the real scripts and in Trainer
WORLD_SIZES = (1, 2, 4)


def make_backbone(folder: Path) -> None:
    """DistilBERT-base's shape with random weights, its tokenizer from the packaged backbone."""
    torch.manual_seed(0)
    model = NewsClassifier(Config())
    save_file(model.distilbert.state_dict(), folder / "model.safetensors")
    shape = {"model_type": "distilbert"} | asdict(Config())
    (folder / "config.json").write_text(json.dumps(shape))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(packaged_backbone() / name, folder)


def settings(world_size: int, precision: str, cuda: bool, quick: bool) -> list[dict]:
    """What step_pieces.py measures in a launch of `world_size` processes."""
    # the largest first: what it takes of fresh memory the others find there
    batches = (32, 16, 8) if quick else (128, 64, 32, 16, 8)
    known = (8, 32) if quick else (16, 64, 128)
    middle = 16 if quick else 32  # a process's share in the waterfall
    accumulations = (2,) if quick else (2, 4)
    if world_size == 1:
        twice = () if quick else (2 * batches[0],)  # what two processes of the largest are up to
        chosen = [{"variant": "single", "micro": micro} for micro in (*twice, *batches)]
        chosen += [{"variant": "single", "micro": 16, "accumulation": k} for k in accumulations]
        if cuda:
            chosen += [{"variant": "single", "micro": 32, "precision": "fp32"},
                       {"variant": "single", "micro": 32, "compiled": True}]  # fmt: skip
    else:
        chosen = [{"variant": "ddp", "micro": micro} for micro in batches]
        chosen += [{"variant": "ddp", "micro": 16, "accumulation": k} for k in accumulations]
        chosen += [{"variant": "no_sync", "micro": micro} for micro in sorted({*known, middle})]
        chosen += [{"variant": "apart", "micro": middle}]
        chosen += [{"variant": "ddp", "micro": micro, "compression": kind}
                   for kind in (("bf16",) if quick else ("bf16", "fp16"))
                   for micro in ((8,) if quick else (8, 32))]  # fmt: skip
        chosen += [{"variant": "ddp", "micro": micro, "sparse": True}
                   for micro in ((8,) if quick else (8, 32))]  # fmt: skip
    steps = (10 if quick else 30) if cuda else (2 if quick else 3)
    return [{"precision": precision, "steps": steps} | one for one in chosen]


class Bench:
    """Starts what is measured; `devices` GPUs, or shares of the cores with `threads` each."""

    def __init__(self, backbone: Path, source: str, rows: int, folder: Path, cuda, devices: int):
        self.backbone, self.source, self.rows, self.folder = backbone, source, rows, folder
        self.cuda, self.devices = cuda, devices
        self.threads = max(1, machine.cores() // devices)

    def start(self, command: list, threads: int, gpus: range) -> subprocess.Popen:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.devices))))
        visible = ",".join(seen.split(",")[gpu] for gpu in gpus) if self.cuda else ""
        env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT),
               "CUDA_VISIBLE_DEVICES": visible,
               "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}  # fmt: skip
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=self.folder, env=os.environ | env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen) -> str:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{out}\nerror: {shlex.join(map(str, process.args))} failed")
        return out

    def launch(self, world_size: int) -> list:
        if world_size == 1:
            return []
        launcher = ROOT / "training" / "torchrun.py"
        return [launcher, "--standalone", "--nproc-per-node", world_size]

    def script(self, world_size: int, threads: int, name: str, device=0):
        """Starts a real script at BATCH rows a process; what is returned waits for its record."""
        report = self.folder / f"{name}.json"
        script = ROOT / "training" / ("train_ddp.py" if world_size > 1 else "train_single.py")
        flags = ["--model", self.backbone, "--data", self.source, "--max-train-samples",
                 world_size * self.rows, "--max-eval-samples", 8, "--epochs", 1,
                 "--global-batch-size", world_size * BATCH, "--fresh",
                 "--checkpoint-dir", self.folder / name, "--report", report]  # fmt: skip
        gpus = range(device, device + world_size)
        process = self.start([*self.launch(world_size), script, *flags], threads, gpus)

        def wait() -> dict:
            self.finish(process)
            record = json.loads(report.read_text())
            epoch = record["epochs"][0]
            figures = {"samples_per_second": epoch["samples_per_second"]}
            return figures | {"peak_memory_mb": record["peak_memory_mb"]}

        return wait

    def trainer(self, *flags: str) -> dict:
        command = ["-m", "benchmarks.trainer_baseline", self.backbone, self.source, self.rows]
        process = self.start([*command, *flags], self.threads * self.devices, range(1))
        return json.loads(self.finish(process).splitlines()[-1])

    def scripts(self) -> dict[str, dict]:
        """The real scripts and Trainer: one process has all cores, or one GPU."""
        cores = self.threads * self.devices
        result = {"single": self.script(1, cores, "single")()}
        result["trainer_best"] = self.trainer("--best")
        result["trainer_defaults"] = self.trainer()
        result["naive"] = self.trainer("--pad-to-max")
        if self.devices > 1:
            result["ddp"] = self.script(2, self.threads, "ddp")()
            apart = [self.script(1, self.threads, f"apart{n}", device=n) for n in range(2)]
            rates = [wait()["samples_per_second"] for wait in apart]
            result["two_apart"] = {"samples_per_second": sum(rates)}
        return result

    def pieces(self, world_size: int, threads: int, chosen: list[dict], precision: str) -> dict:
        plan, out = self.folder / "plan.json", self.folder / "out.json"
        plan.write_text(json.dumps({"backbone": str(self.backbone), "source": self.source,
                                    "precision": precision, "settings": chosen}))  # fmt: skip
        command = [*self.launch(world_size), "-m", "benchmarks.step_pieces", plan, out]
        self.finish(self.start(command, threads, range(world_size)))
        return json.loads(out.read_text())

    def round(self, precision: str, quick: bool) -> dict:
        result = {"scripts": self.scripts(), "pieces": {}}
        for world_size in (n for n in WORLD_SIZES if n <= self.devices):
            chosen = settings(world_size, precision, self.cuda, quick)
            result["pieces"][str(world_size)] = self.pieces(
                world_size, self.threads, chosen, precision
            )
        if not (self.cuda or quick) and self.devices > 1:  # what one process makes of all cores
            chosen = settings(1, precision, False, quick)
            cores = self.threads * self.devices
            result["pieces"]["all cores"] = self.pieces(1, cores, chosen, precision)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small round, for a first look")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--model", default="base", help="packaged, a name or a folder (default: "
                        "DistilBERT-base's shape, random weights)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=35, help="no round starts that would end "
                        "later, but for the first")  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training_speed.json; "
                        "with --quick: runs/training_speed_quick.json")  # fmt: skip
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise utils.UsageError("--device cuda needs a GPU, and none is visible; use --device cpu")
    cuda = torch.cuda.is_available() and args.device != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    devices = torch.cuda.device_count() if cuda else machine.cores()
    devices = max(n for n in WORLD_SIZES if n <= devices)
    precision, _ = utils.choose_precision("auto", device)
    source = os.environ.get("AG_NEWS_DIR", "sample")
    source = source if source == "sample" else str(Path(source).resolve())
    rows = {(False, True): 64, (False, False): 192, (True, True): 1920, (True, False): 9600}
    rounds, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "base":
            backbone, model = Path(folder) / "backbone", "DistilBERT-base, random weights"
            backbone.mkdir()
            make_backbone(backbone)
        else:
            backbone, model, _ = find_backbone(args.model)
        config = read_config(json.loads((backbone / "config.json").read_text()))
        data = prepare_data(source, backbone, 128, rows[cuda, args.quick], 8).train
        flops = fmean(flops_per_sample(config, int(tokens)) for tokens in data.lengths)
        bench = Bench(backbone.resolve(), source, len(data), Path(folder), cuda, devices)
        while len(rounds) < (1 if args.quick else 3):
            rounds.append(bench.round(precision, args.quick))
            minutes = (time.perf_counter() - began) / 60
            rates = {name: round(figures["samples_per_second"], 1)
                     for name, figures in rounds[-1]["scripts"].items()}  # fmt: skip
            print(f"round {len(rounds)}, after {minutes:.1f} min, samples/s:", rates, flush=True)
            if minutes * (len(rounds) + 1) / len(rounds) > args.minutes:
                break
    command = ["python", "-m", "benchmarks.bench_training", *sys.argv[1:]]
    record = {
        "script": "bench_training", "command": shlex.join(command), "host": machine.host(device),
        "device": device.type, "devices": devices, "versions": machine.versions(),
        "git_commit": machine.git_commit(), "minutes": (time.perf_counter() - began) / 60,
        "data": source if source == "sample" else f"folder {Path(source).name}",
        "model": model, "config": asdict(config), "precision": precision, "batch": BATCH,
        "instructions": os.environ.get("ONEDNN_MAX_CPU_ISA", "all that the CPU has"),
        "rows": len(data), "mean_tokens": float(data.lengths.mean()),
        "gflop_per_sample": flops / 1e9, "rounds": rounds,
    }  # fmt: skip
    default = ROOT / "runs" / "training_speed_quick.json"
    out = args.out or (default if args.quick else RESULTS / "training_speed.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    with errors.one_line_errors(ModelError, DataError, utils.UsageError):
        main()
