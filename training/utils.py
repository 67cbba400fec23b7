"""What both training scripts need around the loop. At world size 1 every reduction is a no-op."""

import ctypes
import hashlib
import importlib.util
import json
import math
import mmap
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
NOT_FINITE = 1000  # above every signal number, so that it wins where ranks agree on why to stop


class UsageError(Exception):
    """Something asked for that cannot be; the message is one line and names the remedy."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message is one line and names the file."""


# Ranks


def rank_info() -> tuple[int, int]:
    """(rank, world_size), as torchrun set them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def torchrun_world_size() -> int:
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        raise UsageError("train_ddp.py is started by torchrun: bash training/run_ddp.sh [flags]")
    return rank_info()[1]


def print0(*args, **kwargs) -> None:
    """print on rank 0 alone."""
    if rank_info()[0] == 0:
        with tqdm.external_write_mode():  # so that a line of text does not tear the progress bar
            print(*args, **kwargs, flush=True)


def reduce_sum(values: list[float]) -> list[float]:
    """The sums over all ranks, in float64, which keeps counts exact. Every rank must call it."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)  # on the CPU: gloo carries it
    dist.all_reduce(tensor)
    return tensor.tolist()


def reduce_max(value: int) -> int:
    """The largest over all ranks. Every rank must call it."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def settle() -> None:
    """Waits for all ranks, and until gloo's threads have let go of the last tensors.

    As far as thread dumps tell they need the interpreter lock for it. On a busy machine, several
    runs in a hundred that closed the group right after their last collective hung or were aborted.
    """
    dist.barrier()
    time.sleep(0.3)


TIMEOUT = timedelta(seconds=float(os.environ.get("TIMEOUT", 600)))  # for a collective


def explain(error: Exception, kinds: tuple) -> tuple[str | None, bool]:
    """(one line for an error that a user can cause or meet, whether another rank caused it)."""
    text = str(error)
    if isinstance(error, kinds):
        return text, rank_info()[0] > 0  # as a rule all ranks meet it; one of them tells
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory; try a smaller --micro-batch-size", False
    if not isinstance(error, RuntimeError) or not re.search("gloo|nccl|connection", text, re.I):
        return None, False
    if "timed out" in text.lower():
        return (
            f"another rank did not come to a collective within {TIMEOUT.total_seconds():.0f} s: it "
            "hangs, or the network between hosts is cut; the same command goes on from the last "
            "save, if any"
        ), True
    return "another rank has gone; the same command goes on from the last save, if any", True


@contextmanager
def one_line_errors(*kinds: type[Exception]):
    """Turns errors that a user can cause or meet into one line, status 1; others keep a traceback.

    When one rank fails, the collectives of the others fail too. They keep quiet for as long as
    torchrun needs to end them, so that the cause alone is read; if it does not, they speak.
    """
    try:
        yield
    except Exception as error:
        line, caused_elsewhere = explain(error, kinds)
        if caused_elsewhere:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        sys.stdout.flush()
        with tqdm.external_write_mode():  # takes the progress bar away, and it stays away
            if line is None:
                traceback.print_exc()
            else:
                print(f"error: {line}", file=sys.stderr, flush=True)
            os._exit(1)  # an orderly exit can wait for ranks that are gone


def end_with_launcher() -> None:
    """Under torchrun on Linux, has the kernel kill this process when torchrun dies.

    torchrun ends its ranks, but not when it is killed itself; they would train on, unseen, beside
    the run that is started next.
    """
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if str(os.getppid()) != os.environ.get("LAUNCHER_PID", str(os.getppid())):
            os._exit(1)  # it died before that


class StopSignal:
    """SIGTERM and SIGINT end the process; while `deferred` they are noted, and the loop ends it.

    Before the loop they have the system's own effect: Python could not run a handler while it waits
    inside of torch for ranks that are gone.
    """

    def __init__(self):
        self.number, self._deferred = 0, False
        end_with_launcher()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    @property
    def deferred(self) -> bool:
        return self._deferred

    @deferred.setter
    def deferred(self, value: bool) -> None:
        self._deferred = value
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, number: int, frame) -> None:
        self.number = self.number or number
        if not self.deferred:
            self.exit(number, "stopped; the same command goes on from the last save, if any")

    def exit(self, number: int, message: str) -> None:
        print0(message)
        os._exit(128 + number)  # a shell's status for it; at once, as other ranks may be gone


# The machine


def tune_memory() -> None:
    """Has glibc keep large freed blocks and oneDNN few kernels: faster steps, a smaller heap.

    Every step frees and allocates its gradients and activations again, and of blocks that went
    back to the kernel it has to clear each page. Between them lie torch's CPU kernels, one for
    every shape. oneDNN would keep 1,024, and the heap grow around them while new shapes come; with
    64 the layers of one step still share theirs.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc, nothing to tune
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def hub_answers(seconds: float = 5) -> bool:
    """Whether the Hugging Face Hub can be reached; if not, its libraries are told to work offline.

    In a thread, since a silent name server blocks for longer than any socket's time limit.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    answers = []

    def ask():
        url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds)
            answers.append(True)
        except urllib.error.HTTPError:  # an answer, if not a friendly one
            answers.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read at the first import of huggingface_hub, later
    return bool(answers)


def choose_device(backend: str | None = None) -> tuple[torch.device, str]:
    """This process's device, by LOCAL_RANK, and its backend. `backend` None means one process."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if backend else 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if backend else 1
    gpus = torch.cuda.device_count()
    if backend == "nccl" and not gpus:
        raise UsageError("--backend nccl needs a GPU, and none is visible; use auto or gloo")
    if not gpus:
        return torch.device("cpu"), "gloo" if backend else "no backend"
    if processes > gpus and backend != "gloo":
        raise UsageError(
            f"{processes} processes for {gpus} GPU{'s' * (gpus > 1)}; start {gpus} of them "
            f"(NPROC_PER_NODE={gpus}), or let them share with --backend gloo"
        )
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)  # before the group starts, or every rank opens GPU 0 as well
    return device, {None: "no backend", "gloo": "gloo"}.get(backend, "nccl")


def choose_precision(choice: str, device: torch.device) -> tuple[str, str]:
    """`--precision` -> (fp32, bf16 or fp16; why)."""
    if choice == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU; on a CPU use auto, bf16 or fp32")
    if choice != "auto":
        return choice, "named"
    if device.type == "cuda":
        # is_bf16_supported() says yes on a T4 too, which only emulates bf16
        major, minor = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16", f"compute capability {major}.{minor}"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return "bf16", f"this CPU has {flag}"
    return "fp32", "this CPU has no bf16 arithmetic"


def autocast(device: torch.device, precision: str):
    """A maker of contexts: matrix products in 16 bits, the weights and all else in fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return partial(torch.autocast, device.type, dtype=dtype, enabled=precision != "fp32")


# Steps


def check_flags(args, world_size: int) -> tuple[int, int]:
    """Refuses flags that make no sense; returns (micro_batch_size, grad_accum_steps)."""
    for name in ("epochs", "save_every", "max_steps", "max_train_samples", "max_eval_samples",
                 "patience", "global_batch_size", "micro_batch_size"):  # fmt: skip
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 8 <= args.max_length <= 512:
        raise UsageError(f"--max-length {args.max_length}: expected 8 to 512")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise UsageError(f"--lr {args.lr}: expected a number above 0")
    if not 0 <= args.warmup <= 1:
        raise UsageError(f"--warmup {args.warmup}: expected a part of all steps, 0 to 1")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise UsageError(f"--dropout {args.dropout}: expected 0 or more and below 1")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: expected 0 or more")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UsageError("--tensorboard needs a package: pip install tensorboard")
    return accumulation(args.global_batch_size, args.micro_batch_size, world_size)


def accumulation(global_size: int, micro: int | None, world_size: int) -> tuple[int, int]:
    """(micro_batch_size, grad_accum_steps): global = micro x world_size x accumulation, exactly."""
    unit = (micro or 1) * world_size
    if global_size % unit:
        below = global_size - global_size % unit
        nearest = below if below and global_size - below <= unit / 2 else below + unit
        what = f"{micro} rows x " if micro else ""
        raise UsageError(
            f"--global-batch-size {global_size} is not divisible by {unit} ({what}{world_size} "
            f"processes); the nearest that is: {nearest}"
        )
    micro = micro or global_size // world_size
    return micro, global_size // (micro * world_size)


def seed_step(seed: int, epoch: int, step: int, rank: int = 0) -> None:
    """Makes a step's dropout masks a function of these four numbers.

    So a resumed run draws the same ones with no generator state saved, and ranks draw different
    ones: with equal masks they would drop the same units, which is a weaker regulariser.
    """
    sequence = np.random.SeedSequence([seed, epoch, step, rank])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def lr_at(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of all steps, then linear decay to zero."""
    warmup_steps = max(1, round(warmup * total_steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (total_steps - step) / max(1, total_steps - warmup_steps)


def set_lr(optimizer, step: int, total_steps: int, peak: float, warmup: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, total_steps, peak, warmup)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: biases and LayerNorm's weights, all vectors, are spared."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def is_bad(loss_sum: float | None) -> bool:
    return loss_sum is not None and not math.isfinite(loss_sum)


def explain_not_finite(at: dict, precision: str, last_pt: Path) -> str:
    cause = "fp16 overflow or too high a --lr" if precision == "fp16" else "too high a --lr"
    kept = f"{last_pt} holds the last good state" if last_pt.exists() else "nothing was saved yet"
    return (
        f"the loss is no finite number at epoch {at['epoch'] + 1}, step {at['step']}; likely "
        f"cause: {cause}; {kept}"
    )


def evaluate(model: nn.Module, loader, device, autocast, total: int) -> tuple[float, float]:
    """(mean loss, accuracy) over all `total` rows, exact at any world size. Every rank calls it.

    Takes the unwrapped model: ranks may hold different numbers of batches, and DDP's forward is
    made for equal ones.
    """
    model.eval()
    loss_sum = correct = count = 0.0
    with torch.inference_mode():
        for input_ids, attention_mask, labels in loader:
            labels = labels.to(device)
            with autocast():
                logits = model(input_ids.to(device), attention_mask.to(device)).float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
    model.train()
    loss_sum, correct, count = reduce_sum([loss_sum, correct, count])
    assert count == total, f"evaluated {count} rows of {total}"
    return loss_sum / total, correct / total


class Stopwatch:
    """Seconds and rows by activity, in at["seconds"] and at["rows"].

    The device is synchronised at each change of activity. A process's first steps are "warmup":
    memory is fresh, and a GPU chooses its kernels.
    """

    WARMUP = 3

    def __init__(self, device: torch.device, at: dict):
        self.device, self.at, self.activity, self.since, self.steps = device, at, None, 0.0, 0

    def switch(self, activity: str | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # launches return early; the work is what is timed
        now = time.perf_counter()
        if self.activity:
            seconds = self.at["seconds"]
            seconds[self.activity] = seconds.get(self.activity, 0.0) + now - self.since
        self.activity, self.since = activity, now

    def train(self) -> None:
        self.switch("train" if self.steps >= self.WARMUP else "warmup")

    def step(self, rows: int) -> None:
        self.at["rows"][self.activity] = self.at["rows"].get(self.activity, 0) + rows
        self.steps += 1
        if self.steps == self.WARMUP:
            self.train()


class Progress:
    """A bar over the whole run, on rank 0 alone: rows done, samples/s, time left, its loss."""

    def __init__(self, at: dict, steps, total_steps: int):
        def rows_until(step: int) -> int:
            epochs, rest = divmod(step, len(steps))
            return epochs * len(steps.lengths) + rest * steps.global_batch_size

        self.rank, self.world_size = rank_info()
        self.loss_sum, self.unread, self.rows, self.began = 0.0, 0, 0, time.perf_counter()
        tty = sys.stderr.isatty()
        self.bar = tqdm(
            total=rows_until(total_steps),
            initial=rows_until(at["epoch"] * len(steps) + at["step"]),
            unit=" samples",
            dynamic_ncols=tty,
            mininterval=0.5 if tty else 10,  # in a log file every refresh is a line
            disable=self.rank > 0,
        )
        self.close = self.bar.close

    def update(self, rows: int, loss_sum: float | None) -> None:
        """Adds a step's rows; shows the mean loss since the running sum was last read."""
        self.rows += rows
        self.unread += rows
        if loss_sum is not None:
            loss = (loss_sum - self.loss_sum) * self.world_size / self.unread
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.loss_sum, self.unread = loss_sum, 0
        self.bar.update(rows)
        elapsed = time.perf_counter() - self.began
        if self.began and elapsed > 15:  # once, as soon as there is something to go by
            rate, self.began = self.rows / elapsed, 0
            hours = (self.bar.total - self.bar.n) / rate / 3600 if self.rank == 0 else 0
            if hours > 1:
                print0(
                    f"at {rate:.1f} samples/s this takes about {hours:.1f} hours more; the quick "
                    "way: --model packaged --max-train-samples 4000 --epochs 1, or --data sample"
                )


def end_epoch(at: dict, train: tuple, val: tuple, model: nn.Module, patience: int | None) -> bool:
    """Adds an epoch's (loss, accuracy) pairs to at["history"]; True when patience is at its end."""
    seconds, rows = at["seconds"], at["rows"].get("train", 0)
    spent = seconds.get("train", 0.0)
    epoch = {
        "epoch": at["epoch"] + 1,
        "train_loss": train[0], "train_accuracy": train[1],
        "val_loss": val[0], "val_accuracy": val[1],
        "seconds": spent, "samples_per_second": rows / spent if spent else None,
        **{f"{name}_seconds": seconds.get(name, 0.0) for name in ("warmup", "save", "eval")},
    }  # fmt: skip
    print0(
        f"epoch {epoch['epoch']}: train loss {train[0]:.4f}, accuracy {train[1]:.4f}; validation "
        f"loss {val[0]:.4f}, accuracy {val[1]:.4f}; {spent + epoch['warmup_seconds']:.1f} s"
    )
    at["history"].append(epoch)
    at |= {"epoch": at["epoch"] + 1, "step": 0, "totals": [0.0, 0.0], "seconds": {}, "rows": {}}
    if patience is None:
        return False
    losses = [epoch["val_loss"] for epoch in at["history"]]
    since_best = len(losses) - 1 - losses.index(min(losses))
    if since_best == 0:
        at["best"] = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    return since_best >= patience


# The run record


def cores() -> int:
    """Those this process may use; fewer than the machine's where it was given a part of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def host(device: torch.device) -> str:
    """The machine in a few words: its GPU, or its processor and the cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores()} cores"


def versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {"python": platform.python_version(), **packages, "os": platform.system()}


def git_commit() -> str | None:
    """The checkout's commit, with -dirty where tracked files were changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def peak_memory_mb(device: torch.device) -> float:
    """MiB: on a GPU the most that tensors took, else the most that this process held resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def start_record(
    args, device, backend, precision, micro_batch_size, grad_accum_steps, total_steps,
    model, model_source, data, labels,
) -> dict:  # fmt: skip
    """The run record, as far as it is known before the first step."""
    _, world_size = rank_info()
    launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    command = launcher if "LOCAL_RANK" in os.environ else ["python"]
    script = os.path.relpath(sys.argv[0], ROOT)
    return {
        "script": Path(script).stem, "command": shlex.join([*command, script, *sys.argv[1:]]),
        "started": datetime.now().isoformat(timespec="seconds"),
        "world_size": world_size, "backend": backend, "device": device.type,
        "precision": precision, "threads": torch.get_num_threads(),
        "data": data.source, "data_fingerprint": data.fingerprint, "labels": list(labels),
        "model": model_source, "config": asdict(model.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_samples": len(data.train), "val_samples": len(data.val),
        "test_samples": len(data.test), "max_length": args.max_length,
        "global_batch_size": args.global_batch_size, "micro_batch_size": micro_batch_size,
        "grad_accum_steps": grad_accum_steps, "lr": args.lr, "warmup": args.warmup,
        "total_steps": total_steps, "seed": args.seed,
        "git_commit": git_commit(), "versions": versions(), "host": host(device),
    }  # fmt: skip


def finish_record(record: dict, at: dict, loss: float, accuracy: float, device, args) -> None:
    """Adds what was measured; writes the record to runs/ and --report, events to --tensorboard."""
    test_seconds = at["seconds"].get("test", 0.0)
    spent = [v for epoch in at["history"] for k, v in epoch.items() if k.endswith("seconds")]
    record |= {
        "epochs": at["history"], "test_loss": loss, "test_accuracy": accuracy,
        "test_seconds": test_seconds, "total_seconds": sum(spent) + test_seconds,
        "peak_memory_mb": peak_memory_mb(device), "resumed_from": at["resumed_from"],
    }  # fmt: skip
    print0(f"test: loss {loss:.4f}, accuracy {accuracy:.4f} on {record['test_samples']:,} rows")
    own = Path("runs") / f"{record['script']}-{datetime.now():%Y%m%d-%H%M%S}.json"
    for path in filter(None, (own, args.report)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:  # no reason to lose the model
            print0(f"warning: cannot write the run record {path}: {error.strerror}")
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(args.tensorboard)) as events:
            for epoch in at["history"]:
                for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
                    events.add_scalar(name, epoch[name], epoch["epoch"])
            events.add_scalar("test_accuracy", accuracy, len(at["history"]))


# Checkpoints

SEAL_BYTES = 2 + len("sha256 ") + 64 + 1


def beside(path: Path) -> tuple[Path, Path]:
    """Where a file is written before it gets its name, and where the one before it is kept."""
    return path.with_name(f".{path.name}.tmp"), path.with_stem(f"{path.stem}.previous")


def seal(file, end: int) -> bytes:
    """What a checkpoint ends in after its first `end` bytes: their SHA-256, as a zip's comment."""
    with mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ) as content:
        comment = f"sha256 {hashlib.sha256(content).hexdigest()}\n".encode()
    return len(comment).to_bytes(2, "little") + comment


def is_sealed(path: Path) -> bool:
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END) - SEAL_BYTES
        if end <= 0:
            return False
        file.seek(end)
        return file.read() == seal(file, end)


def save_checkpoint(state: dict, path: Path, keep_previous: bool = False) -> None:
    """Writes all of `state` or nothing: after a crash or on a full disk the old file is whole.

    torch writes a zip file, which may end in a comment and its length. Here that is a hash of all
    before it, so that one flipped bit is noticed; torch.load reads such a file like any other.
    """
    temporary, previous = beside(path)  # in one folder: a rename to another disk would be a copy
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            torch.save(state, file)
            end = file.seek(-2, os.SEEK_END)  # over the length of no comment
            file.write(seal(file, end))
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the name points to them
        if keep_previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # and so is the name
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or "the disk is full or refuses to be written"
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass
        what = f"cannot save {path}: {reason}; what was there is unchanged"
        raise CheckpointError(what) from None


def load_checkpoint(path: Path, keys: tuple[str, ...]) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Runs no code that the file may hold."""
    state = None
    try:
        if is_sealed(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}; train one first") from None
    except Exception:  # torch raises many kinds: a pickle that wants to run code, a missing tensor
        pass
    if not isinstance(state, dict) or (missing := [key for key in keys if key not in state]):
        what = f"lacks {', '.join(missing)}" if isinstance(state, dict) else "is damaged or foreign"
        raise CheckpointError(f"{path} {what}; delete it or train again")
    return state


def save_model(path: Path, model: nn.Module, record: dict) -> None:
    """The checkpoint that is served: weights, their shape, labels, metrics and origin."""
    metrics = {key: record[key] for key in ("test_loss", "test_accuracy", "test_samples")}
    metrics |= {key: record["epochs"][-1][key] for key in ("val_loss", "val_accuracy")}
    origin = ("data", "data_fingerprint", "model", "git_commit", "versions", "world_size", "seed",
              "precision", "lr", "warmup", "global_batch_size", "total_steps", "train_samples",
              "host", "command")  # fmt: skip
    state = {"model": model.state_dict(), "metrics": metrics}
    state |= {key: record[key] for key in ("config", "labels", "max_length")}
    save_checkpoint(state | {"provenance": {key: record[key] for key in origin}}, path)


def identity_and_plan(record: dict) -> tuple[dict, dict]:
    """What must be equal to go on with a run at all, and what to go on within its epoch."""
    identity = ("model", "config", "labels", "max_length", "data_fingerprint")
    plan = ("world_size", "global_batch_size", "micro_batch_size", "seed")
    return {key: record[key] for key in identity}, {key: record[key] for key in plan}


def save_last(path: Path, at: dict, record: dict, model: nn.Module, optimizer, scaler) -> None:
    """last.pt: all that the rest of the run depends on, and what it must find unchanged."""
    identity, plan = identity_and_plan(record)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"scaler": scaler.state_dict(), "at": at, "identity": identity, "plan": plan}
    save_checkpoint(state, path, keep_previous=True)


def forget(path: Path) -> None:
    """Removes last.pt and what stands beside it: nothing is left to go on with."""
    for old in (path, *beside(path)):
        old.unlink(missing_ok=True)


def read_last(path: Path, record: dict) -> dict | None:
    """The state in last.pt, else in the save before it. None if there is neither.

    A run on other data or of another model is refused. With another world size, batch or seed an
    epoch's steps hold other rows: it begins again.
    """
    _, previous = beside(path)
    keys = ("model", "optimizer", "scaler", "at", "identity", "plan")
    if not path.exists() and not previous.exists():
        return None
    try:
        state = load_checkpoint(path, keys)
    except CheckpointError as error:
        if not previous.exists():
            raise
        print0(f"warning: {error}; going on from the save before it, {previous}")
        path, state = previous, load_checkpoint(previous, keys)
    identity, plan = identity_and_plan(record)
    for name, new in identity.items():
        if (old := state["identity"].get(name)) != new:
            raise CheckpointError(
                f"{path} is of an unfinished run with another {name.replace('_', ' ')} ({old}; now "
                f"{new}): finish that run, or start anew with --resume never"
            )
    at = state["at"]
    at["resumed_from"] = {"epoch": at["epoch"] + 1, "step": at["step"]}
    print0(f"resuming from {path} at epoch {at['epoch'] + 1}, step {at['step']}")
    old_plan = state["plan"]
    changed = [f"{k} {old_plan[k]} -> {new}" for k, new in plan.items() if old_plan[k] != new]
    if changed and at["step"]:
        print0(
            f"{', '.join(changed)}: steps hold other rows now, so epoch {at['epoch'] + 1} begins "
            "again, with the weights as they are"
        )
        at |= {"step": 0, "totals": [0.0, 0.0], "seconds": {}, "rows": {}}
    return state


def resume(path: Path, choice: str, record: dict, model: nn.Module, optimizer, scaler) -> dict:
    """Where the run stands: at its beginning, or where last.pt left it. Every rank calls it.

    Rank 0 reads and sends to the others, which may be on a host without the file.
    """
    rank, _ = rank_info()
    if choice == "never" and rank == 0:
        forget(path)
    box = [read_last(path, record) if choice == "auto" and rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[0] is None:
        at = {"epoch": 0, "step": 0, "totals": [0.0, 0.0], "history": [], "best": None}
        return at | {"seconds": {}, "rows": {}, "resumed_from": None}
    model.load_state_dict(box[0]["model"])
    optimizer.load_state_dict(box[0]["optimizer"])
    scaler.load_state_dict(box[0]["scaler"])
    at = box[0]["at"]
    if rank > 0:
        at["totals"] = [0.0, 0.0]  # rank 0 holds the sums over all
    return at
