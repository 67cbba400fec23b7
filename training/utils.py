"""What both training scripts need around the loop. At world size 1 every reduction here is a no-op."""

import ctypes
import importlib.util
import json
import math
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm


class UsageError(Exception):
    """Something the user asked for that cannot be; the message is one line and names the remedy."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message is one line and names the file."""


NOT_FINITE = 1000  # beyond every signal number, so that it wins where ranks agree on why to stop


# Ranks --------------------------------------------------------------------------------------------


def rank_info() -> tuple[int, int]:
    """(rank, world_size); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print0(*args, **kwargs) -> None:
    """print on rank 0 alone; before the process group starts, torchrun's RANK tells."""
    if int(os.environ.get("RANK", 0)) == 0:
        with tqdm.external_write_mode():  # a line of text does not tear the progress bar
            print(*args, **kwargs, flush=True)


def reduce_sum(values: list[float]) -> list[float]:
    """The sums over all ranks, in float64 so that counts stay exact. A collective: every rank calls it."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)  # on the CPU: gloo carries it, no GPU waits
    dist.all_reduce(tensor)
    return tensor.tolist()


def reduce_max(value: int) -> int:
    """The largest over all ranks. A collective: every rank calls it."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


@contextmanager
def one_line_errors(*kinds: type[Exception]):
    """Turns the errors that a user can cause into one line and exit status 1; any other keeps its traceback.

    Most of them strike all ranks alike. Rank 0 speaks; the others wait for torchrun to end them,
    and speak up only if it does not, for then the error was theirs alone.
    """
    try:
        yield
    except kinds as error:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)
        sys.stdout.flush()
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        os._exit(
            1
        )  # not sys.exit: leaving a process group in an orderly way can wait for ranks that are gone


# Signals ------------------------------------------------------------------------------------------


class StopSignal:
    """SIGTERM and SIGINT: noted while `deferred`, for the loop to stop between two steps; else they end the process."""

    def __init__(self):
        self.number, self.deferred = 0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)

    def _received(self, number: int, frame) -> None:
        self.number = self.number or number
        if not self.deferred:
            self.exit(
                number,
                "stopped between two saves; the same command goes on from the last one, if there is one",
            )

    def exit(self, number: int, message: str) -> None:
        print0(message)
        os._exit(
            128 + number
        )  # as a shell reports a signal; at once, since other ranks may be gone already


# The machine --------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Has glibc keep large freed blocks instead of returning them to the kernel.

    Gradients and activations are freed and allocated again in every step; without this each comes
    back as fresh pages that the kernel has to clear. Worth 10 to 20 % of a training step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # no glibc: nothing to tune
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def hub_answers(seconds: float = 5) -> bool:
    """Whether the Hugging Face Hub can be reached. If not, its libraries are told to use their cache and not to retry.

    In a thread, because a name server that is silent blocks for longer than any socket timeout.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    answers = []

    def ask():
        url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=seconds
            ).close()
            answers.append(True)
        except urllib.error.HTTPError:  # an answer, if not a friendly one
            answers.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = (
            "1"  # read when huggingface_hub is first imported, which is later
        )
    return bool(answers)


def torchrun_world_size() -> int:
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "train_ddp.py is started by torchrun, as in: bash training/run_ddp.sh [flags]"
        )
    return int(os.environ["WORLD_SIZE"])


def choose_device(backend: str | None = None) -> tuple[torch.device, str]:
    """This process's device, by its LOCAL_RANK (0 without torchrun), and the backend that fits it."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if backend == "nccl" and not gpus:
        raise UsageError(
            "--backend nccl needs a GPU and none is visible; use --backend gloo, or auto"
        )
    if not gpus:
        return torch.device("cpu"), "gloo" if backend else "no backend"
    if processes > gpus and backend != "gloo":
        raise UsageError(f"{processes} processes for {gpus} GPU{'s' * (gpus > 1)}; start {gpus} "
                         f"(NPROC_PER_NODE={gpus}), or share with --backend gloo")  # fmt: skip
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)  # before the group starts, or every rank opens a context on GPU 0
    if backend:
        backend = "gloo" if backend == "gloo" else "nccl"
    return device, backend or "no backend"


def compress_gradients(model, kind: str) -> None:
    """Has DDP all-reduce gradients as 16-bit numbers: half the bytes, rounded to 11 or 8 significant bits."""
    if kind != "none":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        model.register_comm_hook(None, getattr(default_hooks, f"{kind}_compress_hook"))


def choose_precision(choice: str, device: torch.device) -> tuple[str, str]:
    """`--precision` -> (fp32, bf16 or fp16; why)."""
    if choice != "auto":
        if choice == "fp16" and device.type == "cpu":
            raise UsageError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
        return choice, "named"
    if device.type == "cuda":
        # not is_bf16_supported(): it is True on a T4, which emulates bf16 many times slower than fp16
        major, minor = torch.cuda.get_device_capability(device)
        return ("bf16" if major >= 8 else "fp16"), f"compute capability {major}.{minor}"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return "bf16", f"this CPU has {flag}"
    return "fp32", "this CPU has no bf16 arithmetic"


def autocast(device: torch.device, precision: str):
    """A context maker: matrix products in bf16 or fp16, everything else and the weights in fp32; or nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return partial(torch.autocast, device.type, dtype=dtype, enabled=precision != "fp32")


# Steps --------------------------------------------------------------------------------------------


def seed_step(seed: int, epoch: int, step: int, rank: int = 0) -> None:
    """Makes the dropout masks of a step a function of these four numbers.

    No generator state has to be saved to resume with the same bits, and ranks draw different masks:
    with the same ones, two ranks would drop the same units on different rows.
    """
    torch.manual_seed(
        int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0] >> 1)
    )


def lr_at(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of all steps, then linear decay to zero."""
    warmup_steps = max(1, round(warmup * total_steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (total_steps - step) / max(1, total_steps - warmup_steps)


def is_bad(loss_sum: float | None) -> bool:
    return loss_sum is not None and not math.isfinite(loss_sum)


def set_lr(optimizer, step: int, total_steps: int, peak: float, warmup: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, total_steps, peak, warmup)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: biases and LayerNorm weights are vectors, and shrinking those only hurts."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def evaluate(
    model: nn.Module, loader, device: torch.device, autocast, total: int
) -> tuple[float, float]:
    """(mean loss, accuracy) over all `total` rows, exact at any world size: ranks sum, then one division.

    Takes the unwrapped model: ranks may hold different numbers of batches, and a DDP forward may not.
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
    """Seconds and rows by activity, kept in `at["seconds"]` and `at["rows"]`, the device synchronised at each change.

    The first steps of a process are "warmup": memory is fresh, and a GPU picks its kernels.
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
    """A bar over the whole run on rank 0: rows done, its loss, samples/s, time left. Elsewhere nothing."""

    SLOW = 3600  # seconds from which a run is worth a word

    def __init__(
        self,
        at: dict,
        steps_per_epoch: int,
        total_steps: int,
        global_batch_size: int,
        rows_per_epoch: int,
    ):
        def rows_until(steps):
            epochs, rest = divmod(steps, steps_per_epoch)
            return epochs * rows_per_epoch + rest * global_batch_size

        done = rows_until(at["epoch"] * steps_per_epoch + at["step"])
        tty = sys.stderr.isatty()
        self.bar = tqdm(
            total=rows_until(total_steps), initial=done, unit=" samples", dynamic_ncols=tty, smoothing=0.1,
            mininterval=0.5 if tty else 10, disable=int(os.environ.get("RANK", 0)) > 0,
        )  # fmt: skip
        self.began, self.rows, self.warned = time.perf_counter(), 0, False
        self.loss_sum, self.unread = 0.0, 0

    def update(self, rows: int, loss_sum: float | None) -> None:
        """Counts a step's rows; where rank 0's running loss sum was read, shows the mean since it was read last."""
        self.unread += rows
        if loss_sum is not None:
            share = self.unread / int(os.environ.get("WORLD_SIZE", 1))
            self.bar.set_postfix_str(
                f"loss {(loss_sum - self.loss_sum) / share:.3f}", refresh=False
            )
            self.loss_sum, self.unread = loss_sum, 0
        self.bar.update(rows)
        self.rows += rows
        elapsed = time.perf_counter() - self.began
        if not self.warned and elapsed > 15:  # once, early, as soon as there is something to go by
            self.warned = True
            hours = (self.bar.total - self.bar.n) * elapsed / self.rows / 3600
            if hours * 3600 > self.SLOW:
                print0(
                    f"at {self.rows / elapsed:.1f} samples/s this takes about {hours:.1f} hours more; the quick way: "
                    "--model packaged --max-train-samples 4000 --epochs 1, or --data sample"
                )

    def close(self) -> None:
        self.bar.close()


# Checkpoints --------------------------------------------------------------------------------------


def save_checkpoint(state: dict, path: Path) -> None:
    """Writes all of `state` or nothing: a crash or a full disk leaves the old file as it was."""
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # same folder: a rename across disks is a copy
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the name points at them
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # and so is the name
        os.close(folder)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's zip writer reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        reason = (
            error.strerror
            if isinstance(error, OSError)
            else "the disk is full or cannot be written"
        )
        raise CheckpointError(
            f"cannot save {path}: {reason}; what was there before is unchanged"
        ) from None


def load_checkpoint(path: Path, keys: tuple[str, ...]) -> dict:
    """The dict that `save_checkpoint` wrote, on the CPU. Runs no code from the file (`weights_only`)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}; train one first") from None
    except Exception:  # truncated zip, foreign pickle, missing storage: torch raises many kinds
        raise CheckpointError(
            f"{path} is damaged or is no checkpoint of this project; delete it or train again"
        ) from None
    if not isinstance(state, dict) or (missing := [key for key in keys if key not in state]):
        what = (
            f"lacks {', '.join(missing)}"
            if isinstance(state, dict)
            else f"holds a {type(state).__name__}"
        )
        raise CheckpointError(
            f"{path} {what}: it is no checkpoint of this project; delete it or train again"
        )
    return state


# The run record -----------------------------------------------------------------------------------


def git_commit() -> str | None:
    """The checkout's commit, with -dirty where tracked files were changed; None outside git."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def host(device: torch.device) -> str:
    """The machine in a few words: its GPU, or its processor and how many cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "os": platform.system(),
    }


def peak_memory_mb(device: torch.device) -> float:
    """On a GPU the most that tensors took, else the most that this process held resident; in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def start_record(args, device, backend, precision, world_size, micro_batch_size, grad_accum_steps,
                 total_steps, model, model_source, data, labels) -> dict:  # fmt: skip
    """The run record as far as it is known before the first step."""
    launcher = (
        ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
        if "LOCAL_RANK" in os.environ
        else ["python"]
    )
    command = [*launcher, os.path.relpath(sys.argv[0], Path(__file__).parent.parent), *sys.argv[1:]]
    return {
        "script": Path(sys.argv[0]).stem, "command": shlex.join(command), "started": datetime.now().isoformat(),
        "world_size": world_size, "backend": backend, "device": device.type, "precision": precision,
        "data": data.source, "data_fingerprint": data.fingerprint, "labels": list(labels),
        "model": model_source, "config": asdict(model.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_samples": len(data.train), "val_samples": len(data.val), "test_samples": len(data.test),
        "max_length": args.max_length, "global_batch_size": args.global_batch_size,
        "micro_batch_size": micro_batch_size, "grad_accum_steps": grad_accum_steps, "lr": args.lr,
        "warmup": args.warmup, "total_steps": total_steps, "seed": args.seed,
        "threads": torch.get_num_threads(), "git_commit": git_commit(), "versions": versions(), "host": host(device),
    }  # fmt: skip


def finish_record(
    record: dict, at: dict, test_loss: float, test_accuracy: float, device, args
) -> None:
    """Adds what was measured and writes the record to runs/, and to --report if that is given."""
    record |= {
        "epochs": at["history"], "test_loss": test_loss, "test_accuracy": test_accuracy,
        "total_seconds": sum(v for epoch in at["history"] for k, v in epoch.items() if k.endswith("seconds"))
        + at["seconds"].get("test", 0.0),
        "test_seconds": at["seconds"].get("test", 0.0), "peak_memory_mb": peak_memory_mb(device),
        "resumed_from": at["resumed_from"],
    }  # fmt: skip
    print0(
        f"test: loss {test_loss:.4f}, accuracy {test_accuracy:.4f} on {record['test_samples']:,} rows"
    )
    own = Path("runs") / f"{record['script']}-{datetime.now():%Y%m%d-%H%M%S}.json"
    for path in (own, args.report):
        if path:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n")
            except OSError as error:
                raise UsageError(f"cannot write the run record {path}: {error.strerror}") from None
    if args.tensorboard:
        write_events(args.tensorboard, record)


def write_events(folder: Path, record: dict) -> None:
    """The epochs of a run record as TensorBoard event files."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as events:
        for epoch in record["epochs"]:
            for name in (
                "train_loss",
                "train_accuracy",
                "val_loss",
                "val_accuracy",
                "samples_per_second",
            ):
                if epoch[name] is not None:
                    events.add_scalar(name, epoch[name], epoch["epoch"])
        events.add_scalar("test_loss", record["test_loss"], len(record["epochs"]))
        events.add_scalar("test_accuracy", record["test_accuracy"], len(record["epochs"]))


def save_model(path: Path, model: nn.Module, record: dict) -> None:
    """The checkpoint that is served: weights, their shape, labels, how good they are, where they come from."""
    metrics = {key: record[key] for key in ("test_loss", "test_accuracy", "test_samples")}
    metrics |= {key: record["epochs"][-1][key] for key in ("val_loss", "val_accuracy")}
    keys = ("data", "data_fingerprint", "model", "git_commit", "versions", "world_size", "seed", "precision", "lr",
            "warmup", "global_batch_size", "total_steps", "train_samples", "host", "command")  # fmt: skip
    save_checkpoint(
        {"model": model.state_dict(), "config": record["config"], "labels": record["labels"],
         "max_length": record["max_length"], "metrics": metrics,
         "provenance": {key: record[key] for key in keys}}, path)  # fmt: skip


# Going on after an interruption -------------------------------------------------------------------


LAST_KEYS = ("model", "optimizer", "scaler", "at", "identity", "plan")


def identity_and_plan(record: dict) -> tuple[dict, dict]:
    """What must be equal for a run to go on at all, and what must be equal for it to go on in mid-epoch."""
    identity = {
        key: record[key]
        for key in ("model", "config", "data", "data_fingerprint", "labels", "max_length")
    }
    return identity, {
        key: record[key] for key in ("world_size", "global_batch_size", "micro_batch_size", "seed")
    }


def save_last(path: Path, at: dict, record: dict, model: nn.Module, optimizer, scaler) -> None:
    identity, plan = identity_and_plan(record)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    save_checkpoint(state | {"at": at, "identity": identity, "plan": plan}, path)


def resume(path: Path, choice: str, record: dict, model: nn.Module, optimizer, scaler) -> dict:
    """Where the run stands: the beginning, or where `last.pt` of an unfinished run left it. A collective.

    Rank 0 reads and sends to the others, which may have no such file: they may be on another host.
    """
    state = read_last(path, record) if choice == "auto" and rank_info()[0] == 0 else None
    if dist.is_initialized():
        box = [state]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        state = box[0]
    if state is None:
        return {"epoch": 0, "step": 0, "totals": [0.0, 0.0], "seconds": {}, "rows": {}, "history": [],
                "best": None, "resumed_from": None}  # fmt: skip
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if rank_info()[0] > 0:
        state["at"]["totals"] = [0.0, 0.0]  # rank 0 goes on with the sums over all
    return state["at"]


def read_last(path: Path, record: dict) -> dict | None:
    """The state in `path` if it fits this run. With another world size, batch or seed its epoch begins again."""
    if not path.exists():
        return None
    state = load_checkpoint(path, LAST_KEYS)
    identity, plan = identity_and_plan(record)
    at = state["at"]
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            raise CheckpointError(f"{path} is of an unfinished run with another {name} ({state['identity'].get(name)}; "
                                  f"now {value}): finish that one, or start anew with --resume never")  # fmt: skip
    at["resumed_from"] = {"epoch": at["epoch"] + 1, "step": at["step"]}
    print0(f"resuming from {path}: epoch {at['epoch'] + 1}, step {at['step']}")
    changed = [
        f"{key} {state['plan'].get(key)} -> {plan[key]}"
        for key in plan
        if state["plan"].get(key) != plan[key]
    ]
    if changed and at["step"]:
        print0(f"{', '.join(changed)}: steps hold other rows now, so epoch {at['epoch'] + 1} begins again, with the "
               "weights as they are")  # fmt: skip
        at |= {"step": 0, "totals": [0.0, 0.0], "seconds": {}, "rows": {}}
    return state


def end_epoch(at: dict, train: tuple, val: tuple, model: nn.Module, patience: int | None) -> bool:
    """Moves `at` to the next epoch and adds this one to its history. True when patience is at its end."""
    seconds, rows = at["seconds"], at["rows"]
    at["history"].append({
        "epoch": at["epoch"] + 1, "train_loss": train[0], "train_accuracy": train[1], "val_loss": val[0],
        "val_accuracy": val[1], "seconds": seconds.get("train", 0.0),
        "samples_per_second": rows.get("train", 0) / seconds["train"] if seconds.get("train") else None,
        "warmup_seconds": seconds.get("warmup", 0.0), "save_seconds": seconds.get("save", 0.0),
        "eval_seconds": seconds.get("eval", 0.0)})  # fmt: skip
    print0("epoch {epoch}: train loss {train_loss:.4f}, accuracy {train_accuracy:.4f}; validation loss {val_loss:.4f}, "
           "accuracy {val_accuracy:.4f}; {seconds:.1f} s".format(**at["history"][-1]))  # fmt: skip
    at |= {"epoch": at["epoch"] + 1, "step": 0, "totals": [0.0, 0.0], "seconds": {}, "rows": {}}
    if patience is None:
        return False
    losses = [epoch["val_loss"] for epoch in at["history"]]
    best = losses.index(min(losses))
    if best == len(losses) - 1:
        at["best"] = {
            name: value.detach().cpu().clone() for name, value in model.state_dict().items()
        }
    return len(losses) - 1 - best >= patience


def explain_not_finite(at: dict, precision: str, path: Path) -> str:
    cause = (
        "fp16 overflow, or too high a learning rate"
        if precision == "fp16"
        else "too high a learning rate"
    )
    kept = f"{path} still holds the last good state" if path.exists() else "nothing was saved yet"
    return (f"the loss is not a finite number at epoch {at['epoch'] + 1}, step {at['step']}; likely cause: {cause} "
            f"(--lr); {kept}")  # fmt: skip


def check_flags(args, world_size: int = 1) -> tuple[int, int]:
    """Refuses values that make no sense; returns (micro_batch_size, grad_accum_steps)."""
    for name in (
        "epochs",
        "save_every",
        "max_steps",
        "max_train_samples",
        "max_eval_samples",
        "patience",
    ):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 8 <= args.max_length <= 512:
        raise UsageError(f"--max-length {args.max_length}: expected 8 to 512")
    if args.lr is not None and not (math.isfinite(args.lr) and args.lr > 0):
        raise UsageError(f"--lr {args.lr}: expected a number above 0")
    if not 0 <= args.warmup <= 1:
        raise UsageError(f"--warmup {args.warmup}: expected a part of all steps, 0 to 1")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UsageError("--tensorboard needs the tensorboard package: pip install tensorboard")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: expected 0 or more")
    return accumulation(args.global_batch_size, args.micro_batch_size, world_size)


def accumulation(
    global_batch_size: int, micro_batch_size: int | None, world_size: int
) -> tuple[int, int]:
    """(micro_batch_size, grad_accum_steps) with global = micro x world_size x accumulation, or a UsageError."""
    unit = (micro_batch_size or 1) * world_size
    if min(global_batch_size, unit) < 1:
        raise UsageError("--global-batch-size and --micro-batch-size must be at least 1")
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = below if below and global_batch_size - below <= unit / 2 else below + unit
        what = (
            f"{micro_batch_size} rows x {world_size} processes"
            if micro_batch_size
            else f"{world_size} processes"
        )
        raise UsageError(
            f"--global-batch-size {global_batch_size} is not divisible by {unit} ({what}); "
            f"the nearest that is: {nearest}"
        )
    micro_batch_size = micro_batch_size or global_batch_size // world_size
    return micro_batch_size, global_batch_size // (micro_batch_size * world_size)
