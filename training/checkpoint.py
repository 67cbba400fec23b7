"""Checkpoints: written whole or not at all, checked when read, resumed at the step of the save.

distilbert_agnews.pt is the trained model, which is served; last.pt is what an unfinished run needs
to resume. The file that each of them replaces stays beside it as *.previous.pt.
"""

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

MODEL, LAST = "distilbert_agnews.pt", "last.pt"
LAST_KEYS = "model optimizer scaler step history epoch_sums recipe launcher world_size".split()
FOLDER = Path(os.environ.get("CHECKPOINT_DIR") or Path(__file__).parent.parent / "checkpoints")
ROUNDING = ("--precision", "--grad-compression")  # a resumed run may have others
claimed = []


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or resumed; one line that names the file."""


# Files


def temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")  # in the same folder: a rename must not copy


def previous_path(path: Path) -> Path:
    return path.with_stem(f"{path.stem}.previous")


def sync_folder(folder: Path) -> None:
    """So that renames in it survive a power cut, too."""
    number = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot
        os.fsync(number)
    os.close(number)


def keep_previous(path: Path) -> None:
    """Gives the file at `path` a second name; with hard links a whole one is always at `path`."""
    if path.exists():
        previous_path(path).unlink(missing_ok=True)
        try:
            os.link(path, previous_path(path))
        except OSError:  # a file system without hard links
            os.replace(path, previous_path(path))


@contextmanager
def hold_signals():
    """Signals that come inside take effect at its end.

    Blocking them would not do: the kernel hands a signal to any of torch's other threads, and
    Python then runs the handler in the main thread all the same.
    """
    held = []
    numbers = [getattr(signal, f"SIG{name}") for name in "TERM INT HUP USR1 USR2".split()]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # handlers belong to the main thread
    before = {n: signal.signal(n, lambda number, frame: held.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


@hold_signals()
def save_checkpoint(state: dict, path: Path) -> None:
    """Writes all of `state` or nothing; what was at `path` becomes *.previous.pt."""
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the name points to them
        keep_previous(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or "the disk is full or cannot be written"
        raise CheckpointError(
            f"cannot save {path}: {reason}; what was there is unchanged"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, keys: Iterable[str]) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Runs no code that the file may hold."""
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes
            intact = archive.testzip() is None  # compares checksums, which torch.load ignores
        state = torch.load(path, map_location="cpu", weights_only=True) if intact else None
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}; train one first") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # many kinds: not a zip file, a pickle that wants to run code
        state = None
    again = f"delete it, or train again{' with --fresh' * (path.name == LAST)}"
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is corrupted or not a DistriNews checkpoint; {again}")
    if missing := [key for key in keys if key not in state]:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: another version of DistriNews wrote it; {again}"
        )
    return state


def claim_folders(args) -> None:
    """Checks that all that the run will write can be written, and locks its checkpoint folder.

    The kernel frees the lock when the process ends, however it ends.
    """
    folders = [args.checkpoint_dir, args.checkpoint_dir / "tokenizer", args.tensorboard]
    folders += [args.report and args.report.parent, getattr(args, "profile", None)]
    for folder in filter(None, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(100_000))  # an empty file fits on a full disk
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {folder}: {error.strerror}; name another folder"
            ) from None
    if args.report and args.report.is_dir():
        raise CheckpointError(f"--report {args.report} is a folder; expected a file's name")
    path = args.checkpoint_dir / ".lock"
    until = time.monotonic() + 10  # a run that was told to stop may still be saving
    while True:
        file = open(path, "a+")
        claimed[:] = [file]  # closing it would free the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()) or time.monotonic() > until:
                break
        except FileNotFoundError:  # the run before has ended, and removed what was waited for
            continue
        except BlockingIOError:
            if time.monotonic() > until:
                file.seek(0)
                raise CheckpointError(
                    f"{args.checkpoint_dir} is in use by {file.read().strip() or 'another run'}; "
                    "wait for it, or use another --checkpoint-dir"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)


def release_folder(folder: Path) -> None:
    """Removes last.pt, what stands beside it, and the lock: nothing is left to resume."""
    delete_last(folder)
    (folder / ".lock").unlink(missing_ok=True)


def copy_files(source: Path, folder: Path) -> None:
    """Without modes and times: `folder` may be a link or a mount, its files another user's."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in filter(Path.is_file, source.iterdir()):
        temporary = temporary_path(folder / file.name)
        try:
            shutil.copyfile(file, temporary)
            with open(temporary, "rb+") as copy:
                os.fsync(copy.fileno())
            os.replace(temporary, folder / file.name)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(folder)


def save_tokenizer(backbone: Path, folder: Path) -> tuple[str, bool]:
    """(SHA-256 of its tokenizer.json, whether another one was there: it is kept as *.previous)."""
    from dataset import load_tokenizer

    temporary, name = temporary_path(folder), "tokenizer.json"
    if os.fsencode(folder) != str(folder).encode(errors="replace"):
        temporary = Path(tempfile.mkdtemp())  # the library writes to no path that is not UTF-8
    previous = folder.with_name(f"{folder.name}.previous")
    try:
        load_tokenizer(backbone).save_pretrained(temporary)
        new = (temporary / name).read_bytes()
        changed = (folder / name).exists() and (folder / name).read_bytes() != new
        if changed:
            shutil.rmtree(previous, ignore_errors=True)
            copy_files(folder, previous)
        copy_files(temporary, folder)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(f"cannot save {folder}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return hashlib.sha256(new).hexdigest(), changed


def save_model(folder: Path, model: nn.Module, record: dict, backbone: Path) -> str:
    """Saves the model that is served: weights, their shape, labels, metrics and origin.

    Returns what to tell the user.
    """
    from dataset import tokenizer_digest

    if tokenizer_digest(backbone) != record["tokenizer_digest"]:
        raise CheckpointError(
            f"the tokenizer in {backbone} has changed since training began; put the former one "
            "back, and the same command saves the model"
        )
    path = folder / MODEL
    before = f"; the model before it is {previous_path(path)}" if path.exists() else ""
    elsewhere = folder.resolve() != FOLDER.resolve()
    setting = f"CHECKPOINT_DIR={shlex.quote(str(folder))} " * elsewhere
    tokenizer, previous_tokenizer = folder / "tokenizer", folder / "tokenizer.previous"
    digest, other_tokenizer = save_tokenizer(backbone, tokenizer)
    if before and other_tokenizer:
        before += f", its tokenizer {previous_tokenizer}"
    names = "test_loss test_accuracy test_samples val_samples".split()
    metrics = {name: record[name] for name in names}
    metrics |= {key: record["epochs"][-1][key] for key in ("val_loss", "val_accuracy")}
    origin = (
        "data data_fingerprint model git_commit versions world_size seed precision lr warmup "
        "global_batch_size total_steps train_samples host command before"
    ).split()
    state = {key: record[key] for key in ("config", "labels", "max_length")}
    state |= {
        "model": model.state_dict(),
        "metrics": metrics,
        "tokenizer_sha256": digest,
        "provenance": {key: record[key] for key in origin} | {"launcher": launcher_id()},
    }
    try:
        save_checkpoint(state, path)
    except CheckpointError:
        if other_tokenizer:  # the model before it needs its own
            with suppress(OSError):
                copy_files(previous_tokenizer, tokenizer)
        raise
    return f"saved {path}{before}; serve it with: {setting}uvicorn inference.app:app --http h11"


# Resuming


def make_recipe(args, data_fingerprint: str, model: nn.Module, precision: str) -> dict:
    """All that decides what is trained. A run resumes with one that is equal in all but ROUNDING.

    The number of processes and the micro-batch are not part of it: they change rounding, and which
    dropout masks are drawn.
    """
    shape = replace(model.config, dropout=0, attention_dropout=0)  # they are told below
    weights = hashlib.sha256(repr(shape).encode())
    # not the head: its random numbers depend on the CPU's instructions, and --seed is listed
    for parameter in model.distilbert.parameters():
        weights.update(parameter.detach().cpu().numpy())
    # causes first: another backbone may bring another dropout
    recipe = {"the data or --max-*-samples": data_fingerprint, "--model": weights.hexdigest()[:16]}
    names = "max_length global_batch_size lr warmup epochs max_steps seed"
    recipe |= {f"--{name.replace('_', '-')}": getattr(args, name) for name in names.split()}
    recipe["--dropout"] = (model.config.dropout, model.config.attention_dropout)
    compression = getattr(args, "grad_compression", "none")
    return recipe | {"--precision": precision, "--grad-compression": compression}


def save_last(args, recipe: dict, trainer_state: dict, step: int, history, epoch_sums) -> None:
    """Saves all that the rest of the run depends on."""
    state = {name: part.state_dict() for name, part in trainer_state.items()}
    state |= {"step": step, "history": history, "epoch_sums": epoch_sums, "recipe": recipe}
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    state |= {"launcher": launcher_id(), "world_size": world_size}
    save_checkpoint(state, args.checkpoint_dir / LAST)


def delete_last(folder: Path) -> None:
    path = folder / LAST
    refused = path.with_stem("last.refused")
    for old in (path, previous_path(path), temporary_path(path), refused):
        old.unlink(missing_ok=True)


def read_last(path: Path, recipe: dict, launcher: str | None = None, say=print) -> dict | None:
    """The state in last.pt, else in the save before it, which it says; None if there is neither.

    With `launcher`, None as well unless this very torchrun has started the run that saved it.
    """
    previous = previous_path(path)
    if not path.exists() and not previous.exists():
        return None
    try:
        state = load_checkpoint(path, LAST_KEYS)
    except CheckpointError as error:
        if launcher and not previous.exists():
            return None
        if not previous.exists() or (path.exists() and not os.access(path, os.R_OK)):
            raise
        problem = error if path.exists() else f"{path} is gone"
        say(f"warning: {problem}; resuming from the save before it, {previous}")
        state = load_checkpoint(previous, LAST_KEYS)
        # else the next save would keep the corrupted one as `previous`
        if path.exists():
            os.replace(path, path.with_stem("last.refused"))
        os.replace(previous, path)
    if launcher and state["launcher"] != launcher:
        return None
    saved = state["recipe"]
    changed = [n for n in recipe if n not in ROUNDING and saved.get(n) != recipe[n]]
    if changed:
        changes = ", ".join(f"{n} (was {saved.get(n)}, now {recipe[n]})" for n in changed)
        sources = {"--model", "the data or --max-*-samples"} & {*changed}
        hint = " (what auto finds can change: name the model and the data then)" * bool(sources)
        raise CheckpointError(
            f"{path} is an unfinished run with another recipe: {changes}; finish that run with its "
            f"own flags{hint}, or start over with --fresh"
        )
    return state


def launcher_id() -> str:
    """The torchrun that started this process; the same after torchrun restarts the ranks.

    Its own random number is a part, since in a container host name and process repeat.
    """
    return f"{platform.node()} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID')}"


def resume(args, recipe: dict, trainer_state: dict) -> tuple[int, dict, Tensor]:
    """(step, history, epoch_sums) of the run that last.pt holds, else of a new one.

    `epoch_sums` are the loss, correct rows, rows and seconds of the epoch so far. Every rank calls
    it: rank 0 reads and sends the state to the others, which may be on a host without the file.
    Ranks that torchrun restarted resume even with --fresh, if it was this run that saved.
    """
    from errors import print0

    folder, state, finished = args.checkpoint_dir, None, False
    distributed = dist.is_initialized()
    restarted = distributed and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not distributed or dist.get_rank() == 0:
        if args.fresh and not restarted:
            delete_last(folder)
        launcher = launcher_id() if args.fresh else None
        state = read_last(folder / LAST, recipe, launcher, print0)
        if state:
            saved = state["recipe"] = dict.fromkeys(ROUNDING, "none") | state["recipe"]
            changed = [name for name in ROUNDING if recipe[name] != saved[name]]
            changes = [f", {name} {recipe[name]} instead of {saved[name]}" for name in changed]
            print0(f"resuming from {folder / LAST} at step {state['step']}{''.join(changes)}")
        elif restarted and (folder / MODEL).exists():  # perhaps killed after its last save
            with suppress(CheckpointError):  # an older model, which this run will replace
                provenance = load_checkpoint(folder / MODEL, ("provenance",))["provenance"]
                finished = provenance.get("launcher") == launcher_id()
    if distributed:
        from_rank_0 = [state, finished]
        dist.broadcast_object_list(from_rank_0, device=torch.device("cpu"))
        state, finished = from_rank_0
    if finished:
        if dist.get_rank() == 0:
            release_folder(folder)
        dist.all_reduce(torch.zeros(1))  # a barrier on the CPU
        os._exit(0)  # nothing is left to do; an orderly exit can hang
    if state is None:
        history = {name: [] for name in ("epochs", "curve", "resumed_at", "before")}
        return 0, history, torch.zeros(4, dtype=torch.float64)
    for name, part in trainer_state.items():
        if name != "scaler" or (part.is_enabled() and state[name]):  # empty unless both are fp16
            part.load_state_dict(state[name])
    state["history"]["resumed_at"].append(state["step"])
    part = {name[2:].replace("-", "_"): state["recipe"][name] for name in ROUNDING}
    part |= {"world_size": state["world_size"], "until_step": state["step"]}
    state["history"]["before"].append(part)
    return state["step"], state["history"], state["epoch_sums"]
