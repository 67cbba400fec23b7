"""How fast training is here: against Trainer, the machine's GEMM, and processes that do not talk.

python -m benchmarks.bench_training [--rounds 3] [--rows 480] [--out FILE]

DistilBERT-base with random weights (speed does not depend on their values), real text lengths from
AG_NEWS_DIR or else the sample, batch 32 in a process. Every round runs every variant, so that a
noisy minute strikes all; figures are medians over rounds, ratios medians of the rounds' ratios.
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 shows a CPU with AMX as one without.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from training import utils
from training.dataset import prepare_data
from training.model import Config, NewsClassifier, packaged_backbone

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BATCH = 32


def make_backbone(folder: Path) -> None:
    """DistilBERT-base's shape with random weights, its tokenizer from the packaged backbone."""
    torch.manual_seed(0)
    model = NewsClassifier(Config())
    save_file(model.distilbert.state_dict(), folder / "model.safetensors")
    shape = {"model_type": "distilbert"} | asdict(Config())
    (folder / "config.json").write_text(json.dumps(shape))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(packaged_backbone() / name, folder)


def flops_per_sample(config: Config, tokens: int) -> float:
    """Floating-point operations that training spends on a row of `tokens` tokens in this model.

    Two per multiply-add; backward costs twice the forward. In the last layer only keys and values
    see all tokens: queries, output and feed-forward are computed for the first one alone.
    """
    d, h, t = config.dim, config.hidden_dim, tokens
    layer = 2 * t * (4 * d * d + 2 * d * h) + 4 * t * t * d
    last = 2 * t * 2 * d * d + 2 * (2 * d * d + 2 * d * h) + 4 * t * d
    head = 2 * (d * d + d * config.num_labels)
    return 3 * ((config.n_layers - 1) * layer + last + head)


def gemm_rate(config: Config, dtype: torch.dtype, device: torch.device, seconds=3.0) -> float:
    """FLOP/s of the model's own matrix products, a batch of 52-token rows, back to back."""
    m, d, h = BATCH * 52, config.dim, config.hidden_dim
    # in the proportion of a layer: query, key, value, output; up; down
    shapes = [(d, d, 4), (d, h, 1), (h, d, 1)]
    random = partial(torch.randn, dtype=dtype, device=device)
    pairs = [(random(m, k), random(n, k), times) for k, n, times in shapes]

    def one_pass():
        for x, w, times in pairs:
            for _ in range(times):
                F.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize()

    one_pass()
    began, passes = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        one_pass()
        passes += 1
    flops = passes * sum(2 * m * k * n * times for k, n, times in shapes)
    return flops / (time.perf_counter() - began)


class Bench:
    def __init__(self, backbone: Path, source: str, rows: int, folder: Path):
        self.backbone, self.source, self.rows, self.folder = backbone, source, rows, folder
    def start(self, command: list, threads: int) -> subprocess.Popen:
        env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [*map(str, command)], cwd=self.folder, env=os.environ | env,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ours(self, launcher: list, threads: int, rows: int, global_batch: int, name: str):
        """Starts one of the real scripts; the function returned waits and gives its samples/s."""
        report = self.folder / f"{name}.json"
        flags = ["--model", self.backbone, "--data", self.source, "--max-train-samples", rows,
                 "--max-eval-samples", 8, "--epochs", 1, "--global-batch-size", global_batch,
                 "--resume", "never", "--checkpoint-dir", self.folder / name,
                 "--report", report]  # fmt: skip
        process = self.start([*launcher, *flags], threads)

        def wait() -> float:
            out, _ = process.communicate()
            assert process.returncode == 0, out
            epoch = json.loads(report.read_text())["epochs"][0]
            return rows / (epoch["seconds"] + epoch["warmup_seconds"])

        return wait

    def trainer(self, *flags: str) -> float:
        command = [sys.executable, "-m", "benchmarks.trainer_baseline", self.backbone, self.source]
        process = self.start([*command, self.rows, *flags], os.cpu_count())
        out, _ = process.communicate()
        assert process.returncode == 0, out
        return json.loads(out.splitlines()[-1])["samples_per_second"]

    def round(self) -> dict[str, float]:
        single = [sys.executable, ROOT / "training" / "train_single.py"]
        launch = [sys.executable, ROOT / "training" / "launch.py", "--standalone"]
        ddp = [*launch, "--nproc-per-node", 2, ROOT / "training" / "train_ddp.py"]
        cores, half = os.cpu_count(), max(1, os.cpu_count() // 2)
        result = {"ours": self.ours(single, cores, self.rows, BATCH, "ours")()}
        result["trainer_best"] = self.trainer("--best")
        result["trainer_defaults"] = self.trainer()
        result["ddp"] = self.ours(ddp, half, 2 * self.rows, 2 * BATCH, "ddp")()
        apart = [self.ours(single, half, self.rows, BATCH, name) for name in ("apart0", "apart1")]
        result["two_apart"] = sum(wait() for wait in apart)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=480, help="rows of each process in each run")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_speed.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, _ = utils.choose_precision("auto", device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    source = os.environ.get("AG_NEWS_DIR", "sample")
    source = source if source == "sample" else str(Path(source).resolve())
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        backbone = Path(folder) / "backbone"
        backbone.mkdir()
        make_backbone(backbone)
        lengths = prepare_data(source, backbone, 128, args.rows, 8).train.lengths
        flops = statistics.fmean(flops_per_sample(Config(), int(t)) for t in lengths)
        bench = Bench(backbone, source, args.rows, Path(folder))
        for number in range(args.rounds):
            rounds.append({"gemm": gemm_rate(Config(), dtype, device)} | bench.round())
            figures = {name: round(value, 2) for name, value in rounds[-1].items()}
            print(f"round {number + 1}:", figures, flush=True)
    ratios = {
        "ours over Trainer's defaults": [r["ours"] / r["trainer_defaults"] for r in rounds],
        "ours over Trainer's best flags": [r["ours"] / r["trainer_best"] for r in rounds],
        "ours over the GEMM rate": [r["ours"] * flops / r["gemm"] for r in rounds],
        "two DDP processes over two that do not talk": [r["ddp"] / r["two_apart"] for r in rounds],
    }
    command = ["python", "-m", "benchmarks.bench_training", *sys.argv[1:]]
    record = {
        "script": "bench_training", "command": shlex.join(command), "host": utils.host(device),
        "versions": utils.versions(), "git_commit": utils.git_commit(),
        "data": source if source == "sample" else f"folder {Path(source).name}",
        "model": "DistilBERT-base, random weights", "precision": precision, "batch": BATCH,
        "instructions": os.environ.get("ONEDNN_MAX_CPU_ISA", "all that the CPU has"),
        "rows": args.rows, "mean_tokens": float(lengths.mean()),
        "gflop_per_sample": flops / 1e9, "rounds": rounds,
        "medians": {name: statistics.median(r[name] for r in rounds) for name in rounds[0]},
        "ratios": {name: {"median": statistics.median(v), "all": v} for name, v in ratios.items()},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
