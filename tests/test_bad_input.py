"""A mistake ends in one line that names the remedy: pytest tests/test_bad_input.py"""

import argparse
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import train_single
from ranks import ROOT, Rank, run

import checkpoint
import errors
import model
import utils
from inference.model_loader import Classifier, LoadError


def run_single(monkeypatch, folder, *flags):
    """train_single.main() in this process, raising what the command line prints."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(errors, "note_stop_signals", list)
    monkeypatch.setattr(sys, "argv", ["train_single.py", *map(str, flags)])
    train_single.main()


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "flags, remedy",
    [
        (["--micro-batch-size", "5"], "the nearest that is: 255"),
        (["--micro-batch-size", "512"], "the nearest that is: 512"),
        (["--epochs", "0"], "at least 1"),
        (["--max-steps", "-3"], "at least 1"),
        (["--global-batch-size", "0"], "at least 1"),
        (["--max-length", "4"], "8 to 512"),
        (["--lr", "nan"], "above 0"),
        (["--warmup", "2"], "0 to 1"),
        (["--dropout", "0.999999"], "0 to 0.99"),
        (["--seed", "-1"], "at least 0"),
        (["--seed", str(2**64)], "below 2^63"),
        (["--epochs", "1", "--no-such-flag"], "--no-such-flag; --help lists all flags"),
        (["--epochs", "two"], "invalid int value"),
        (["--checkpoint-dir", ""], "is a variable of the shell not set?"),
        (["--fres"], "--fres; --help lists all flags"),
        (["--precision", "fp16"], "needs a GPU"),
    ],
)
def test_a_flag_that_makes_no_sense(monkeypatch, tmp_path, flags, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(utils.UsageError) as caught:
        run_single(monkeypatch, tmp_path, *flags)
    assert remedy in one_line(caught)


def split(rows, micro, world_size, device="cpu"):
    args = argparse.Namespace(global_batch_size=rows, micro_batch_size=micro)
    return utils.split_batch(args, world_size, torch.device(device))


def test_a_global_batch_that_does_not_divide_names_the_nearest_that_does():
    for size, nearest in (((32, None, 3), 33), ((32, 16, 3), 48), ((31, None, 2), 30)):
        with pytest.raises(utils.UsageError, match=f"not divisible .* that is: {nearest}$"):
            split(*size)


def test_the_micro_batch_is_what_fits_and_accumulation_is_the_rest():
    assert split(32, 4, 2) == (4, 4)  # 32 = 4 rows x 2 processes x 4
    assert split(256, None, 2) == (32, 4)
    assert split(256, None, 2, "cuda") == (128, 1)
    assert split(255, None, 3) == (17, 5)  # the largest divisor of 85 up to 32


def test_the_time_out_of_a_collective_is_a_number_of_seconds(monkeypatch):
    for value, seconds in (("", 600), ("5", 5)):
        monkeypatch.setenv("TIMEOUT", value)
        assert utils.collective_timeout().total_seconds() == seconds
    monkeypatch.setenv("TIMEOUT", "30m")
    with pytest.raises(utils.UsageError, match="TIMEOUT=30m: expected"):
        utils.collective_timeout()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(utils.UsageError, match="needs a GPU"):
        utils.choose_device("nccl")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    with pytest.raises(utils.UsageError, match="NPROC_PER_NODE=2"):
        utils.choose_device("auto")


def test_no_shell_expands_the_home_of_a_flag_s_value(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["", "--checkpoint-dir=~/c", "--data=~/news", "--epochs=3"])
    args = train_single.parse_args()
    utils.check_flags(args)
    assert args.checkpoint_dir == Path("/home/me/c") and args.data == "/home/me/news"


@pytest.mark.parametrize("words", [["--checkpoint-dir="], ["--data", ""]], ids=" ".join)
def test_a_value_from_an_unset_variable_is_refused(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["", *words])
    with pytest.raises(utils.UsageError, match="value is empty"):
        utils.check_flags(train_single.parse_args())


def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    code = (
        "import resource, signal; from pathlib import Path; import run_record\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "tensorboard = run_record.TensorBoard(Path('events'), 0)\n"
        "for step in range(200):\n    tensorboard.write('train', {'loss': 1.0}, step)\n"
    )
    env = {"PYTHONPATH": str(ROOT / "training")}
    done = run([sys.executable, "-c", code], tmp_path, **env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == "warning: cannot write to --tensorboard any more: File too large\n"


def test_tensorboard_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(utils.UsageError, match="pip install tensorboard"):
        run_single(monkeypatch, tmp_path, "--tensorboard", "events")


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("train_ddp.py", [], "bash training/run_ddp.sh"),
        ("train_single.py", ["--data", "/no/such/folder"], "no such folder: /no/such/folder"),
        ("train_single.py", ["--model", "./nowhere"], "no such folder: ./nowhere"),
        ("train_single.py", ["--bath-size", "8"], "unrecognized arguments: --bath-size 8"),
    ],
)
def test_the_command_line_prints_one_line_and_fails(tiny_backbone, tmp_path, script, flags, says):
    rank = Rank([ROOT / "training" / script, "--model", tiny_backbone, *flags], tmp_path)
    rank.collect()
    assert rank.status == 1
    assert rank.stderr.startswith("error: ") and rank.stderr.count("\n") == 1
    assert says in rank.stderr


def test_run_ddp_sh_passes_on_one_line_and_the_status(flags, tmp_path):
    command = ["bash", ROOT / "training" / "run_ddp.sh"]
    command += flags(tmp_path / "c", "--global-batch-size", 7)
    done = run(command, tmp_path, NPROC_PER_NODE="2", MAX_RESTARTS="3")
    assert done.returncode == 1
    assert done.stderr == (  # once: not once a rank, and not once a restart
        "error: --global-batch-size 7 is not divisible by 2 (2 processes); the nearest that is: 6\n"
    )


# Backbones


def test_a_packaged_backbone_that_is_missing_or_another(monkeypatch):
    pytest.importorskip(model.PACKAGED_MODULE)
    monkeypatch.setattr(model, "PACKAGED_SHA256", "0" * 64)
    with pytest.raises(model.ModelError, match="--force-reinstall"):
        model.find_backbone("packaged")
    monkeypatch.setattr(model, "PACKAGED_MODULE", "no_such_module")
    with pytest.raises(model.ModelError, match="requirements-offline.txt"):
        model.find_backbone("packaged")


# Checkpoints


class CodeToRun:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, change):
    state = torch.load(path)
    change(state)
    checkpoint.save_checkpoint(state, path)


CORRUPT = {  # faults/corrupt.py has a hundred more
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "runs code": lambda path: path.write_bytes(pickle.dumps(CodeToRun())),
    "runs code, in a zip": lambda path: checkpoint.save_checkpoint({"model": CodeToRun()}, path),
    "one bit": flip_a_bit,
    "a list": lambda path: checkpoint.save_checkpoint([1, 2], path),
    "another project's": lambda path: checkpoint.save_checkpoint({"state_dict": {}}, path),
    "three classes": lambda path: edit(path, lambda state: state["labels"].pop()),
    "another shape": lambda path: edit(path, lambda state: state["config"].update(dim=64)),
    "NaN": lambda path: edit(path, lambda s: s["model"]["classifier.bias"].fill_(torch.nan)),
    "no tokenizer": lambda path: (path.parent / "tokenizer").rename(path.parent / "elsewhere"),
}


@pytest.mark.parametrize("how", CORRUPT)
def test_a_checkpoint_that_cannot_be_served_is_refused(trained, tmp_path, monkeypatch, how):
    shutil.copytree(trained, tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    Classifier(tmp_path / "c")  # as long as it is whole, it loads
    CORRUPT[how](tmp_path / "c" / "distilbert_agnews.pt")
    with pytest.raises(LoadError) as caught:
        Classifier(tmp_path / "c")
    assert "train" in one_line(caught) and str(tmp_path) in one_line(caught)
    assert not (tmp_path / "it_ran").exists()


def test_a_corrupted_last_pt_is_refused_and_kept(monkeypatch, tmp_path, flags):
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(checkpoint.CheckpointError) as caught:
        run_single(monkeypatch, tmp_path, *flags(tmp_path))
    assert "delete it" in one_line(caught)
    assert (tmp_path / "last.pt").read_bytes() == b"not a checkpoint"


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    checkpoint.save_checkpoint({"step": 1}, tmp_path / "c.pt")

    def write_half(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
        checkpoint.save_checkpoint({"step": 2}, tmp_path / "c.pt")
    monkeypatch.undo()
    assert checkpoint.load_checkpoint(tmp_path / "c.pt", ["step"]) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fault", ["full", "read-only", "not allowed"])
def test_a_disk_that_refuses_leaves_the_old_checkpoint_whole(fault):
    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")

    disk = Path(tempfile.mkdtemp())  # not pytest's folder, which other users cannot enter
    user = os.geteuid()
    try:
        mount("size=300k,mode=755")
        checkpoint.save_checkpoint({"weights": torch.ones(1000)}, disk / "c.pt")
        before = (disk / "c.pt").read_bytes()
        if fault == "read-only":
            mount("remount,ro")
        if fault == "not allowed":
            os.seteuid(65534)
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.save_checkpoint({"weights": torch.ones(200_000)}, disk / "c.pt")
        os.seteuid(user)
        assert "unchanged" in one_line(caught)
        said = {"full": "disk", "read-only": "Read-only", "not allowed": "Permission"}[fault]
        assert said in one_line(caught)
        assert (disk / "c.pt").read_bytes() == before
        assert [path.name for path in disk.iterdir()] == ["c.pt"]
    finally:
        os.seteuid(user)
        subprocess.run(["umount", str(disk)], capture_output=True)
        disk.rmdir()


def test_help_tells_every_flag_and_its_default(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        run_single(monkeypatch, tmp_path, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--epochs", "--lr", "--global-batch-size", "--data", "--precision"):
        after = text[text.index(f" {flag} ", text.index("options:")) :]
        assert "default" in after[: after.index(" --", 3)]
