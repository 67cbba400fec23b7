"""Interrupted runs lose nothing: pytest tests/test_resume.py (bits: test_one_order.py)"""

import argparse
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from ranks import ROOT, environment, run, run_ranks, train

import checkpoint
import errors
from dataset import tokenizer_digest
from model import load_backbone

SINGLE, DDP = (ROOT / "training" / f"train_{name}.py" for name in ("single", "ddp"))
LONG = ["--epochs", 2000, "--save-every", 10**6]


@pytest.fixture(scope="module")
def stopped_at_5(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    (rank,) = train(0, flags(folder / "c"), folder, 143, STOP_AT_STEP="5")
    assert "saved at step 5; the same command resumes" in rank.stdout
    assert not (folder / "c" / "distilbert_agnews.pt").exists()
    return folder / "c"


@pytest.fixture
def unfinished(stopped_at_5, tmp_path):
    """The folder of a run that was stopped in step 5."""
    return shutil.copytree(stopped_at_5, tmp_path / "c")


def test_a_changed_recipe_is_named_and_refused_and_last_pt_is_kept(unfinished, flags, tmp_path):
    before = (unfinished / "last.pt").read_bytes()
    recipe = torch.load(unfinished / "last.pt")["recipe"]
    names = "max-length global-batch-size lr warmup dropout epochs max-steps seed model precision"
    names += " grad-compression"
    names = {f"--{name}" for name in names.split()} | {"the data or --max-*-samples"}
    assert recipe.keys() == names
    for name in names - {*checkpoint.ROUNDING}:
        with pytest.raises(
            checkpoint.CheckpointError, match=f"^[^\n]*{re.escape(name)} [^\n]*--fresh$"
        ):
            checkpoint.read_last(unfinished / "last.pt", recipe | {name: "another"})
    (rank,) = train(0, flags(unfinished, "--max-train-samples", 40), tmp_path, 1)
    assert rank.stderr.startswith("error: ") and rank.stderr.count("\n") == 1
    assert (unfinished / "last.pt").read_bytes() == before


def test_another_precision_resumes_and_says_so(unfinished, flags, tmp_path):
    state = torch.load(unfinished / "last.pt")
    other = "bf16" if state["recipe"]["--precision"] == "fp32" else "fp32"
    (rank,) = train(0, flags(unfinished, "--precision", other), tmp_path)
    assert f"at step 5, --precision {other} instead of" in rank.stdout
    before = {"world_size": 1, "precision": state["recipe"]["--precision"], "until_step": 5}
    before = [before | {"grad_compression": "none"}]
    saved = torch.load(unfinished / "distilbert_agnews.pt")["provenance"]
    assert rank.record["before"] == saved["before"] == before


def test_another_compression_resumes_and_says_so(unfinished, flags, tmp_path):
    zero, _ = train(2, flags(unfinished, "--grad-compression", "bf16"), tmp_path)
    assert "at step 5, --grad-compression bf16 instead of none" in zero.stdout
    assert zero.record["before"][0]["grad_compression"] == "none"


def test_a_run_whose_reader_is_gone_resumes(unfinished, tmp_path):
    (unfinished / "last.pt").rename(unfinished / "last.previous.pt")  # so that two lines are said
    code = (
        "import sys, torch, checkpoint; from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "args = SimpleNamespace(checkpoint_dir=Path(sys.argv[1]), fresh=False)\n"
        "recipe = torch.load(args.checkpoint_dir / 'last.previous.pt')['recipe']\n"
        "sys.exit(checkpoint.resume(args, recipe, {})[0] != 5)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as out:
        command = [sys.executable, "-c", code, unfinished]
        assert not subprocess.run(command, cwd=tmp_path, env=environment(), stdout=out).returncode


def test_the_backbones_own_dropout_may_be_named_and_another_is_refused_as_such(
    unfinished, flags, tmp_path, tiny_backbone
):
    own = json.loads((tiny_backbone / "config.json").read_text())["dropout"]
    (rank,) = train(0, flags(unfinished, "--dropout", 0.25), tmp_path, 1)
    assert "--dropout (was" in rank.stderr and "--model" not in rank.stderr
    (rank,) = train(0, flags(unfinished, "--dropout", own), tmp_path)
    assert rank.record["resumed_at"] == [5]


def test_fresh_starts_over(unfinished, flags, tmp_path):
    (rank,) = train(0, flags(unfinished, "--fresh", "--lr", "1e-3"), tmp_path)
    assert rank.record["resumed_at"] == [] and len(rank.seen["grads"]) == 28


@pytest.mark.parametrize("saved_by, resumed_at", [("this run", [5]), ("another", [])])
def test_ranks_that_torchrun_restarted_resume_even_with_fresh_what_this_run_saved(
    unfinished, flags, tmp_path, saved_by, resumed_at
):
    if saved_by == "another":  # and this run died before its first save
        state = torch.load(unfinished / "last.pt")
        torch.save(state | {"launcher": "a host 1"}, unfinished / "last.pt")
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1"}
    zero, _ = train(2, flags(unfinished, "--fresh"), tmp_path, **restarted)
    assert zero.record["resumed_at"] == resumed_at


def test_a_corrupted_last_pt_is_never_kept_as_the_previous_one(unfinished):
    path = unfinished / "last.pt"
    state = torch.load(path)
    checkpoint.save_checkpoint(state, path)
    path.write_bytes(b"corrupted")
    assert checkpoint.read_last(path, state["recipe"])["step"] == 5
    checkpoint.save_checkpoint(state, path)
    for whole in (path, checkpoint.previous_path(path)):
        assert checkpoint.load_checkpoint(whole, checkpoint.LAST_KEYS)["step"] == 5


def test_a_run_restarted_after_its_last_save_does_not_train_again(flags, tmp_path):
    run = flags(tmp_path / "c", "--max-steps", 3)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "distilbert_agnews.pt").write_bytes(b"an older, corrupted model")
    train(2, run, tmp_path, TORCHELASTIC_RESTART_COUNT="1")  # the first try saved nothing
    before = (tmp_path / "c" / "distilbert_agnews.pt").read_bytes()
    ranks = run_ranks(2, [DDP, *run], tmp_path, TORCHELASTIC_RESTART_COUNT="1")
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].stderr
    assert (tmp_path / "c" / "distilbert_agnews.pt").read_bytes() == before


def test_a_model_that_is_replaced_is_kept_and_named(flags, tmp_path):
    run = flags(tmp_path / "c", "--max-steps", 1)
    train(0, run, tmp_path)
    first = (tmp_path / "c" / "distilbert_agnews.pt").read_bytes()
    (rank,) = train(0, [*run, "--seed", "1"], tmp_path)
    assert (tmp_path / "c" / "distilbert_agnews.previous.pt").read_bytes() == first
    assert "distilbert_agnews.previous.pt" in rank.stdout
    assert f"CHECKPOINT_DIR={tmp_path / 'c'} uvicorn" in rank.stdout


@pytest.fixture
def other(tiny_backbone, tmp_path):
    """A backbone with another tokenizer."""
    other = shutil.copytree(tiny_backbone, tmp_path / "other")
    text = (other / "tokenizer.json").read_text().replace('"goal"', '"aim"')
    (other / "tokenizer.json").write_text(text)
    return other


def test_the_tokenizer_of_a_model_that_is_replaced_is_kept_if_it_is_another(
    tiny_backbone, other, tmp_path, monkeypatch
):
    for name in ("copystat", "copymode"):  # as on a mount that refuses, or with another's files
        monkeypatch.setattr(shutil, name, None)
    folder = tmp_path / "tokenizer"
    first = checkpoint.save_tokenizer(tiny_backbone, folder)
    assert checkpoint.save_tokenizer(tiny_backbone, folder) == (first[0], False)
    second = checkpoint.save_tokenizer(other, folder)
    assert second[0] != first[0] and second[1]
    for place, digest in ((folder, second[0]), (tmp_path / "tokenizer.previous", first[0])):
        saved = (place / "tokenizer.json").read_bytes()
        assert hashlib.sha256(saved).hexdigest() == digest
    assert len(list(tmp_path.iterdir())) == 3  # and nothing temporary


def test_a_model_that_cannot_be_saved_leaves_the_former_one_its_tokenizer(
    tiny_backbone, other, tmp_path, monkeypatch
):
    record = defaultdict(int, epochs=[defaultdict(int)])
    record["tokenizer_digest"] = tokenizer_digest(tiny_backbone)
    model, read = torch.nn.Linear(1, 1), (tmp_path / "tokenizer" / "tokenizer.json").read_bytes
    assert checkpoint.save_model(tmp_path, model, record, tiny_backbone).startswith("saved ")
    former = read()
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(checkpoint.CheckpointError, match="has changed since training began"):
        checkpoint.save_model(tmp_path, model, record, other)  # its rows were tokenised otherwise
    record["tokenizer_digest"] = tokenizer_digest(other)
    with pytest.raises(checkpoint.CheckpointError, match="what was there is unchanged"):
        checkpoint.save_model(tmp_path, model, record, other)
    assert read() == former


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(number)

    monkeypatch.setattr(os, "fsync", refuse)
    checkpoint.save_checkpoint({"a": 1}, tmp_path / "a.pt")
    assert checkpoint.load_checkpoint(tmp_path / "a.pt", "a") == {"a": 1}


def test_another_torchrun_of_the_same_host_and_process_number_is_another(monkeypatch):
    found = set()
    for number in "ab":  # in a container torchrun is always process 1
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", number)
        found.add(checkpoint.launcher_id())
    assert len(found) == 2


@pytest.mark.parametrize("more, without", [([], ""), (["--fresh"], " without --fresh")])
def test_a_failure_says_how_to_resume(monkeypatch, more, without):
    monkeypatch.setattr(sys, "argv", ["train_ddp.py", *more])
    line, _ = errors.explain(RuntimeError("gloo: Connection closed by peer"), ())
    assert line.endswith(f"; the same command{without} resumes from the last save")


@pytest.mark.parametrize("broken", ["stdout", "stderr"])
def test_a_stream_that_breaks_leaves_the_other_in_use(broken):
    """One is a pipe that nobody reads, as after `| head`, the other a terminal."""
    say = {"stdout": "errors.print0('{}')", "stderr": "print('{}', file=sys.stderr)"}[broken]
    code = f"import errors, sys; {say.format('said')}; {say.format('and said')}"
    if broken == "stderr":
        code = f"import errors, sys; errors.discard_output(2); {code}"
    terminal, other = os.openpty()
    unread, pipe = os.pipe()
    os.close(unread)
    how = {"stdout": other, "stderr": other} | {broken: pipe}
    env = environment(PYTHONPATH=str(ROOT / "training"))
    done = subprocess.run([sys.executable, "-c", code], env=env, **how)
    assert done.returncode == 0 and os.read(terminal, 1000) == b"said\r\nand said\r\n"


def test_a_recipe_does_not_depend_on_the_random_head(tiny_backbone):
    args, recipes = argparse.Namespace(), []
    names = "max_length global_batch_size lr warmup epochs max_steps seed"
    vars(args).update(dict.fromkeys(names.split()))
    for seed in (0, 1):
        torch.manual_seed(seed)  # as another instruction set would do
        recipes.append(checkpoint.make_recipe(args, "", load_backbone(tiny_backbone), "fp32"))
    assert recipes[0] == recipes[1]


def test_a_path_that_is_not_utf8_will_do(tiny_backbone, tmp_path, monkeypatch):
    """As é in a Latin-1 locale; the libraries in Rust take none."""
    odd = tmp_path / os.fsdecode(b"b\xff")
    shutil.copytree(tiny_backbone, odd / "backbone")
    load_backbone(odd / "backbone")
    checkpoint.save_tokenizer(tiny_backbone, odd / "tokenizer")
    assert (odd / "tokenizer" / "tokenizer.json").exists()
    monkeypatch.setattr("tempfile.mkdtemp", None)  # in a container there may be no other folder
    checkpoint.save_tokenizer(tiny_backbone, tmp_path / "é" / "tokenizer")


def test_a_tokenizer_folder_may_hold_a_folder(tiny_backbone, tmp_path):
    (tmp_path / "tokenizer" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("another")
    assert checkpoint.save_tokenizer(tiny_backbone, tmp_path / "tokenizer")[1]
    assert (tmp_path / "tokenizer.previous" / "tokenizer.json").read_text() == "another"


def start(command: list, folder, stderr=subprocess.STDOUT, stdout=subprocess.PIPE):
    """The command in the background."""
    how = {"cwd": folder, "env": environment(NPROC_PER_NODE="2"), "text": True}
    return subprocess.Popen([*map(str, command)], stdout=stdout, stderr=stderr, **how)


def test_training_saves_where_the_server_of_this_shell_reads(flags, tmp_path):
    command = flags(tmp_path / "other", "--max-steps", 1)
    at = command.index("--checkpoint-dir")
    command[at : at + 2] = []
    (rank,) = train(0, command, tmp_path, CHECKPOINT_DIR=str(tmp_path / "c"))
    assert (tmp_path / "c" / "distilbert_agnews.pt").exists() and "CHECKPOINT" not in rank.stdout


def test_the_model_is_saved_when_nobody_reads_the_output(flags, tmp_path):
    command = [sys.executable, "-u", SINGLE, *flags(tmp_path / "a folder")]
    process = start(command, tmp_path, stderr=subprocess.PIPE)
    next(line for line in process.stdout if "steps:" in line)
    process.stdout.close()  # `| head`
    assert process.wait(60) == 0, process.stderr.read()
    names = {path.name for path in (tmp_path / "a folder").iterdir()}
    assert names == {"distilbert_agnews.pt", "tokenizer"}


def test_closed_and_narrow_output_do_not_stop_a_run(flags, news_folder, tmp_path):
    news = shutil.copytree(news_folder, tmp_path / "n\u00e9ws")
    command = shlex.join(flags(tmp_path / "c d", "--data", news, "--max-steps", 2))
    command = f"{sys.executable} {SINGLE} {command} 2>&-"
    done = run(["bash", "-c", command], tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stdout
    assert "n\\xe9ws" in done.stdout and f"CHECKPOINT_DIR='{tmp_path / 'c d'}' " in done.stdout


@pytest.fixture
def owner(tmp_path):
    """What a run in this process claims folders with, and the lock that it holds."""
    args = argparse.Namespace(checkpoint_dir=tmp_path / "c", tensorboard=None, report=None)
    checkpoint.claim_folders(args)
    (lock,) = checkpoint.claimed
    yield args, lock
    lock.close()
    checkpoint.claimed.pop().close()


def test_a_folder_that_another_run_uses_is_refused(owner, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(0, 11).__next__)  # seconds; it waits for 10
    monkeypatch.setattr(checkpoint, "time", clock)
    said = f"^[^\n]* is in use by process {os.getpid()} on [^\n]*; wait for it[^\n]*$"
    with pytest.raises(checkpoint.CheckpointError, match=said):
        checkpoint.claim_folders(owner[0])


def test_a_run_that_waited_for_the_one_before_owns_the_folder(owner):
    args, lock = owner
    waiting = threading.Thread(target=checkpoint.claim_folders, args=[args])
    waiting.start()
    time.sleep(0.5)
    checkpoint.release_folder(args.checkpoint_dir)  # removes the file that the other waits for
    lock.close()
    waiting.join()
    assert not can_claim(args.checkpoint_dir)


@pytest.mark.parametrize("flag", ["--checkpoint-dir", "--tensorboard", "--report"])
def test_what_cannot_be_written_is_refused_before_the_first_step(flags, tmp_path, flag):
    (tmp_path / "file").write_text("a file, not a folder")
    path = tmp_path / "file" / "below" if flag == "--report" else tmp_path / "file"
    (rank,) = run_ranks(1, [DDP, *flags(tmp_path / "c", flag, path)], tmp_path)
    assert rank.status == 1 and rank.stdout == ""
    assert rank.stderr.startswith("error: cannot write to ") and rank.stderr.count("\n") == 1
    if flag == "--report":
        (rank,) = run_ranks(1, [DDP, *flags(tmp_path / "c", flag, tmp_path)], tmp_path)
        assert rank.stderr == f"error: --report {tmp_path} is a folder; expected a file's name\n"


def start_long(script, flags, folder, out):
    """A long run in the background; returns its process once it has trained an epoch."""
    program = "bash" if script == "run_ddp.sh" else sys.executable
    command = [program, ROOT / "training" / script, *flags(folder / "c", *LONG)]
    process = start(command, folder, stdout=out)
    until = time.monotonic() + 90
    while "epoch 2:" not in (folder / "out").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    return process


# that run_ddp.sh passes each signal on is in test_launch.py
@pytest.mark.parametrize(
    "script, name",
    [
        ("run_ddp.sh", "SIGTERM"),
        ("train_single.py", "SIGINT"),
        ("train_single.py", "SIGHUP"),
        pytest.param("train_single.py", "SIGTERM", marks=pytest.mark.slow),
        pytest.param("train_single.py", "SIGUSR1", marks=pytest.mark.slow),
        ("train_single.py", "SIGUSR2"),
    ],
)
def test_a_signal_saves_says_how_to_resume_and_exits_with_128_plus_its_number(
    flags, tmp_path, script, name
):
    number = getattr(signal, name)
    with open(tmp_path / "out", "w") as out:
        process = start_long(script, flags, tmp_path, out)
        saved = (tmp_path / "c" / "last.pt").stat().st_mtime
        os.kill(process.pid, number)
        assert process.wait(30) == 128 + number
    said = (tmp_path / "out").read_text()
    assert said.count(name) == 1 and said.count("the same command resumes") == 1
    assert "Traceback" not in said
    assert (tmp_path / "c" / "last.pt").stat().st_mtime > saved


def test_ctrl_c_that_also_ends_the_reader_of_its_output_still_saves(flags, tmp_path):
    process = start([sys.executable, SINGLE, *flags(tmp_path / "c", *LONG)], tmp_path)
    next(line for line in process.stdout if "epoch 2:" in line)
    saved = (tmp_path / "c" / "last.pt").stat().st_mtime
    process.stdout.close()  # `| tee log`
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert (tmp_path / "c" / "last.pt").stat().st_mtime > saved


@pytest.mark.parametrize("script", ["train_single.py", "run_ddp.sh"])
def test_repeated_ctrl_c_ends_soon_and_leaves_a_whole_last_pt(flags, tmp_path, script):
    with open(tmp_path / "out", "w") as out:
        process = start_long(script, flags, tmp_path, out)
        for _ in range(5):
            if process.poll() is None:
                os.kill(process.pid, signal.SIGINT)
                time.sleep(0.02)
        assert process.wait(20) in (130, -signal.SIGINT)  # a shell reports 130 for both
    assert "Traceback" not in (tmp_path / "out").read_text()
    until = time.monotonic() + 10  # the ranks end with torchrun
    while not (free := can_claim(tmp_path / "c")) and time.monotonic() < until:
        time.sleep(0.2)
    assert free
    assert checkpoint.load_checkpoint(tmp_path / "c" / "last.pt", checkpoint.LAST_KEYS)
    assert not list((tmp_path / "c").glob(".*.tmp"))


def can_claim(folder) -> bool:
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_gradient_that_is_not_finite_is_never_saved(flags, tmp_path):
    (rank,) = train(0, flags(tmp_path / "c", "--save-every", 1), tmp_path, 1, FAULT="nan")
    assert "grad_norm is nan at step 3" in rank.stderr and "--lr" in rank.stderr
    state = checkpoint.load_checkpoint(tmp_path / "c" / "last.pt", checkpoint.LAST_KEYS)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())
