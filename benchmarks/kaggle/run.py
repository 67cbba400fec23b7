"""The benchmark on Kaggle's two T4s, from preflight to finished pages; kernel.py starts it.

python -m benchmarks.kaggle.run WORKING [--quick] [--model NAME]

--quick: the sample, one epoch, one small round; also on a CPU, to see that it runs. Checkpoints,
records and pages end up in WORKING.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NEEDED = ("transformers", "datasets", "tqdm", "accelerate", "matplotlib", "pandas", "jinja2")
# NCCL's host memory path fails where cards have no peer access, as reported of its version 2.27
ATTEMPTS = (
    {},
    {"NCCL_CUMEM_HOST_ENABLE": "0"},
    {"NCCL_CUMEM_HOST_ENABLE": "0", "NCCL_P2P_DISABLE": "1"},
)
BASH = ["bash", "training/run_ddp.sh"]
LEVERS = {
    "one GPU": [],
    "two GPUs, plain DDP": [],
    "compressed gradients": ["--grad-compression", "fp16"],
    "sparse embeddings": ["--sparse-embeddings"],
    "both": ["--grad-compression", "fp16", "--sparse-embeddings"],
}


def run(*command, seconds: float | None = None, **extra: str) -> None:
    words = list(map(str, command))
    print("\n$", " ".join([f"{k}={v}" for k, v in extra.items()] + words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True, timeout=seconds, env=os.environ | extra)


def install() -> None:
    """What the image lacks; torch stays the image's own."""
    if not all(map(importlib.util.find_spec, NEEDED)):
        files = ("requirements.txt", "requirements-dev.txt")
        lines = "\n".join((ROOT / name).read_text() for name in files)
        wanted = re.findall(rf"^(?:{'|'.join(NEEDED)})[^#\s]*", lines, re.MULTILINE)
        run(sys.executable, "-m", "pip", "install", "--quiet", *wanted)


def preflight(processes: int) -> dict:
    """A timed all-reduce, and the environment with which it works; raises if none does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "benchmarks/kaggle/preflight.py"]
    for extra in ATTEMPTS:
        print(f"\nall-reduce between {processes} processes with {extra or 'no settings'}:", end=" ")
        how = {"cwd": ROOT, "env": os.environ | extra | {"NCCL_DEBUG": "INFO"}, "text": True}
        how |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, **how)
        try:
            said, _ = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            print("hangs", flush=True)
            continue
        answer = re.search(r"^\{.*\}$", said, re.MULTILINE)
        if process.returncode or not answer:
            print(f"fails ({said.strip().splitlines()[-1][:200]})", flush=True)
            continue
        via = sorted(set(re.findall(r"via (\S+)", said))) or ["gloo"]
        figures = json.loads(answer[0]) | {"environment": extra, "transport": via}
        print(
            f"{1e3 * figures['seconds']:.1f} ms for 64 MiB, {figures['gb_per_second']:.2f} GB/s, "
            f"by {', '.join(via)}",
            flush=True,
        )
        return figures
    raise SystemExit("error: no all-reduce works between these devices; see above")


def levers(flags: list, gpus: list, quick: bool) -> None:
    """What one GPU does, two with plain DDP, and two with each way to send less; as a record.

    The scripts themselves at the default global batch, about a minute each. The rate is the median
    over the curve's points, without the first two, in which kernels are chosen and buckets rebuilt.
    """
    steps, report = (4 if quick else 300), ROOT / "runs" / "lever.json"
    rows = []
    for how, more in LEVERS.items():
        one_gpu = how == "one GPU"
        script = [sys.executable, "training/train_single.py"] if one_gpu else BASH
        visible = {"CUDA_VISIBLE_DEVICES": "0" if gpus else ""} if one_gpu else {}
        more = [*more, "--max-steps", steps, "--max-eval-samples", 64, "--report", report]
        run(*script, *flags, ROOT / "runs" / "lever", *more, **visible)
        record = json.loads(report.read_text())
        rate = median([point["samples_per_second"] for point in record["curve"]][2:])
        row = {"how": how, "flags": " ".join(LEVERS[how]), "samples_per_second": rate}
        rows.append(row | {name: record[name] for name in ("global_batch_size", "host")})
        speedup = rate / rows[0]["samples_per_second"]
        print(f"{how}: {rate:,.0f} samples/s, {speedup:.2f} x one GPU")
    (RESULTS / "kaggle_levers.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("working", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", help="instead of distilbert-base-uncased")
    args = parser.parse_args()
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    print("GPUs:", ", ".join(gpus) or "none", flush=True)
    if not args.quick and len(gpus) < 2:
        sys.exit(
            "error: two GPUs are needed: choose the accelerator GPU T4 x2 (verified accounts "
            "only), or see that it runs at all with --quick"
        )
    install()
    checked = preflight(max(2, len(gpus)))
    os.environ |= checked["environment"]
    (RESULTS / "kaggle_preflight.json").write_text(json.dumps(checked | {"gpus": gpus}, indent=1))

    model = args.model or "distilbert-base-uncased"  # the benchmark's own needs a package
    speed = ["--model", model, *(["--quick"] if args.quick else ["--minutes", "30"])]
    data = ["--data", "sample", "--epochs", "1", "--global-batch-size", "16"] if args.quick else []
    flags = ["--model", model, *data, "--fresh", "--checkpoint-dir"]
    single = [sys.executable, "training/train_single.py", *flags]
    single += [args.working / "checkpoints_single", "--report", RESULTS / "kaggle_single.json"]
    run(*single, CUDA_VISIBLE_DEVICES="0" if gpus else "")
    run(*BASH, *flags, args.working / "checkpoints", "--report", RESULTS / "kaggle_ddp.json")
    levers(flags, gpus, args.quick)
    speed += ["--out", RESULTS / "training_speed_kaggle.json"]
    try:
        run(sys.executable, "-m", "benchmarks.bench_training", *speed)
    except subprocess.CalledProcessError as error:  # the trainings and their pages are worth more
        print(f"warning: no speed was measured: {error}", flush=True)
    run(sys.executable, "-m", "benchmarks.report")
    tools = shutil.ignore_patterns("*.py", "*.lua", "__pycache__", "kaggle", "templates")
    target = args.working / "benchmarks"
    shutil.copytree(ROOT / "benchmarks", target, ignore=tools, dirs_exist_ok=True)
    print(f"\ndone: {args.working}/benchmarks/ddp_2gpu.md, records, checkpoints", flush=True)


if __name__ == "__main__":
    main()
