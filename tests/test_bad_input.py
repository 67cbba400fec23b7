"""A mistake ends in one line that names the remedy: pytest tests/test_bad_input.py"""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import train_single
from ranks import ROOT, environment

import model
import utils
from inference.model_loader import Classifier, LoadError


def run_single(monkeypatch, folder, *flags):
    """train_single.main() in this process, raising what the command line prints."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(utils, "StopSignal", lambda: type("Off", (), {"number": 0})())
    monkeypatch.setattr(sys, "argv", ["train_single.py", *map(str, flags)])
    train_single.main()


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "flags, remedy",
    [
        (["--micro-batch-size", "5"], "the nearest that is: 30"),
        (["--micro-batch-size", "64"], "the nearest that is: 64"),
        (["--epochs", "0"], "at least 1"),
        (["--max-steps", "-3"], "at least 1"),
        (["--global-batch-size", "0"], "at least 1"),
        (["--max-length", "4"], "8 to 512"),
        (["--lr", "nan"], "above 0"),
        (["--warmup", "2"], "0 to 1"),
        (["--dropout", "1"], "below 1"),
        (["--seed", "-1"], "0 or more"),
        (["--precision", "fp16"], "needs a GPU"),
    ],
)
def test_a_flag_that_makes_no_sense(monkeypatch, tmp_path, flags, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(utils.UsageError) as caught:
        run_single(monkeypatch, tmp_path, *flags)
    assert remedy in one_line(caught)


@pytest.mark.parametrize(
    "rows, micro, world_size, nearest", [(32, None, 3, 33), (32, 16, 3, 48), (31, None, 2, 30)]
)
def test_a_global_batch_that_does_not_divide_names_the_nearest_that_does(
    rows, micro, world_size, nearest
):
    with pytest.raises(utils.UsageError, match=f"not divisible .* the nearest that is: {nearest}$"):
        utils.accumulation(rows, micro, world_size)


def test_accumulation_is_what_is_left():
    assert utils.accumulation(32, 4, 2) == (4, 4)  # 32 = 4 rows x 2 processes x 4
    assert utils.accumulation(32, None, 2) == (16, 1)


def test_nccl_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(utils.UsageError, match="needs a GPU"):
        utils.choose_device("nccl")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(utils.UsageError, match="NPROC_PER_NODE=2"):
        utils.choose_device("auto")


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
    ],
)
def test_the_command_line_prints_one_line_and_fails(tiny_backbone, tmp_path, script, flags, says):
    if "--model" not in flags:
        flags = [*flags, "--model", str(tiny_backbone)]
    command = [sys.executable, str(ROOT / "training" / script), *flags]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


def test_run_ddp_sh_passes_on_one_line_and_the_status(tiny_backbone, news_folder, tmp_path):
    command = ["bash", ROOT / "training" / "run_ddp.sh", "--model", tiny_backbone, "--data"]
    command += [news_folder, "--global-batch-size", 7]
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=environment(NPROC_PER_NODE="2"),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
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


def test_a_backbone_folder_that_lacks_a_file_or_does_not_fit(tiny_backbone, tmp_path):
    (tmp_path / "config.json").write_text((tiny_backbone / "config.json").read_text())
    with pytest.raises(model.ModelError, match="model.safetensors"):
        model.load_backbone(tmp_path)
    text = (tiny_backbone / "config.json").read_text().replace('"n_layers": 2', '"n_layers": 3')
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes((tiny_backbone / "model.safetensors").read_bytes())
    with pytest.raises(model.ModelError, match="does not fit its own config.json"):
        model.load_backbone(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(model.ModelError, match="usable backbone"):
        model.load_backbone(tmp_path)


# Checkpoints


class Evil:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def spoil(folder, how):
    path = folder / "distilbert_agnews.pt"
    state = torch.load(path)
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "runs code":
        path.write_bytes(pickle.dumps(Evil()))
    elif how == "one bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "runs code, with a hash":
        utils.save_checkpoint({"model": Evil()}, path)
    elif how == "a list":
        utils.save_checkpoint([1, 2], path)
    else:
        if how == "another project's":
            state = {"state_dict": {}}
        elif how == "three classes":
            state["labels"] = state["labels"][:3]
        elif how == "another shape":
            state["config"]["dim"] = 64
        elif how == "NaN":
            state["model"]["classifier.bias"][0] = float("nan")
        elif how == "no tokenizer":
            (folder / "tokenizer").rename(folder / "elsewhere")
        utils.save_checkpoint(state, path)


@pytest.mark.parametrize(
    "how",
    ["missing", "truncated", "empty", "runs code", "runs code, with a hash", "one bit", "a list",
     "another project's", "three classes", "another shape", "NaN", "no tokenizer"],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_served_is_refused(trained, tmp_path, monkeypatch, how):
    subprocess.run(["cp", "-r", trained, tmp_path / "c"], check=True)
    monkeypatch.chdir(tmp_path)
    Classifier(tmp_path / "c")  # as long as it is whole, it loads
    spoil(tmp_path / "c", how)
    with pytest.raises(LoadError) as caught:
        Classifier(tmp_path / "c")
    assert "train" in one_line(caught) and str(tmp_path) in one_line(caught)
    assert not (tmp_path / "it_ran").exists()


def test_a_damaged_last_pt_is_refused_and_kept(monkeypatch, tmp_path, tiny_backbone, news_folder):
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    flags = ["--model", tiny_backbone, "--data", news_folder, "--checkpoint-dir", tmp_path]
    with pytest.raises(utils.CheckpointError) as caught:
        run_single(monkeypatch, tmp_path, *flags)
    assert "delete it" in one_line(caught)
    assert (tmp_path / "last.pt").read_bytes() == b"not a checkpoint"


@pytest.mark.parametrize("ill", ["full", "read-only", "not allowed"])
def test_a_disk_that_refuses_leaves_the_old_checkpoint_whole(ill):
    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")

    disk = Path(tempfile.mkdtemp())  # not pytest's folder, which other users cannot enter
    user = os.geteuid()
    try:
        mount("size=300k,mode=755")
        utils.save_checkpoint({"weights": torch.ones(1000)}, disk / "c.pt")
        before = (disk / "c.pt").read_bytes()
        if ill == "read-only":
            mount("remount,ro")
        if ill == "not allowed":
            os.seteuid(65534)
        with pytest.raises(utils.CheckpointError) as caught:
            utils.save_checkpoint({"weights": torch.ones(200_000)}, disk / "c.pt")
        os.seteuid(user)
        assert "unchanged" in one_line(caught)
        said = {"full": "disk", "read-only": "Read-only", "not allowed": "Permission"}[ill]
        assert said in one_line(caught)
        assert (disk / "c.pt").read_bytes() == before
        assert [path.name for path in disk.iterdir()] == ["c.pt"]
    finally:
        os.seteuid(user)
        subprocess.run(["umount", str(disk)], capture_output=True)
        disk.rmdir()


def test_a_crash_while_saving_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    utils.save_checkpoint({"step": 1}, tmp_path / "c.pt")

    def write_half(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(utils.CheckpointError, match="No space left on device"):
        utils.save_checkpoint({"step": 2}, tmp_path / "c.pt")
    monkeypatch.undo()
    assert utils.load_checkpoint(tmp_path / "c.pt", ("step",)) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    monkeypatch, tmp_path, tiny_backbone, news_folder
):
    flags = ["--model", tiny_backbone, "--data", news_folder, "--checkpoint-dir", tmp_path / "c"]
    flags += ["--save-every", 2, "--global-batch-size", 8]
    good = torch.nn.functional.cross_entropy
    steps = iter(range(1, 1000))

    def bad_at_step_5(*args, **kwargs):
        return good(*args, **kwargs) * (float("nan") if next(steps) == 5 else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", bad_at_step_5)
    with pytest.raises(utils.UsageError) as caught:
        run_single(monkeypatch, tmp_path, *flags)
    assert "epoch 1, step 5" in one_line(caught) and "--lr" in one_line(caught)
    state = utils.load_checkpoint(tmp_path / "c" / "last.pt", ("model", "at"))
    assert state["at"]["step"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())
