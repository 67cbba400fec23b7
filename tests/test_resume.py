"""Interrupt and go on, to the same bits: pytest tests/test_resume.py"""

import os
import signal
import subprocess
import time

import pytest
import torch
from ranks import ROOT, environment, observe

import utils


def flags(backbone, news, folder, *more):
    common = ["--model", backbone, "--data", news, "--checkpoint-dir", folder, "--epochs", "2"]
    return [*common, "--max-eval-samples", "20", *map(str, more)]


def weights(folder):
    return torch.load(folder / "distilbert_agnews.pt")["model"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


BATCH = ("--global-batch-size", 8)  # about 14 steps an epoch


@pytest.mark.parametrize("world_size", [0, 2])  # 0: train_single.py
@pytest.mark.parametrize("stop_at", [5, 20])  # in the middle of either epoch
def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(
    tiny_backbone, news_folder, tmp_path, world_size, stop_at
):
    def run(folder):
        return flags(tiny_backbone, news_folder, tmp_path / folder, *BATCH)

    observe(world_size, run("straight"), tmp_path)
    stopped = observe(world_size, run("broken"), tmp_path, 143, STOP_AT_STEP=str(stop_at))
    assert "stopped at epoch" in stopped[0].stdout and "the same command" in stopped[0].stdout
    for rank in stopped:
        assert len(rank.seen["grads"]) == stop_at  # not one step more
    assert not (tmp_path / "broken" / "distilbert_agnews.pt").exists()
    assert (tmp_path / "broken" / "last.pt").exists()
    resumed = observe(world_size, run("broken"), tmp_path)
    assert "resuming from" in resumed[0].stdout
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "broken"))
    assert not (tmp_path / "broken" / "last.pt").exists()  # nothing is left to go on with


@pytest.fixture
def unfinished(tiny_backbone, news_folder, tmp_path):
    """The folder of a two-process run that was stopped in step 5 of its first epoch."""
    run = flags(tiny_backbone, news_folder, tmp_path / "c", *BATCH)
    observe(2, run, tmp_path, 143, STOP_AT_STEP="5")
    return tmp_path / "c"


def test_another_world_size_begins_the_epoch_again_and_says_so(
    unfinished, tiny_backbone, news_folder, tmp_path
):
    (rank,) = observe(0, flags(tiny_backbone, news_folder, unfinished, *BATCH), tmp_path)
    assert "world_size 2 -> 1" in rank.stdout and "epoch 1 begins again" in rank.stdout
    n = sum(len(rows) for rows in rank.seen["rows"][0])
    assert n == len({row for rows in rank.seen["rows"][1] for row in rows})  # a whole epoch


def test_another_batch_begins_the_epoch_again_and_says_so(
    unfinished, tiny_backbone, news_folder, tmp_path
):
    run = flags(tiny_backbone, news_folder, unfinished, "--global-batch-size", 4)
    zero, _ = observe(2, run, tmp_path)
    assert "global_batch_size 8 -> 4" in zero.stdout and "epoch 1 begins again" in zero.stdout


@pytest.mark.parametrize("what", ["model", "data", "labels"])
def test_another_model_data_or_label_set_is_refused(
    unfinished, tiny_backbone, calm_backbone, news_folder, tmp_path, what
):
    run = flags(tiny_backbone, news_folder, unfinished, *BATCH)
    if what == "model":
        run[1] = calm_backbone
    if what == "data":
        run += ["--max-train-samples", "40"]
    if what == "labels":
        state = torch.load(unfinished / "last.pt")
        state["identity"]["labels"] = ["Sports", "World", "Business", "Sci/Tech"]
        utils.save_checkpoint(state, unfinished / "last.pt")
    before = (unfinished / "last.pt").read_bytes()
    (rank,) = observe(0, run, tmp_path, 1)
    assert rank.stderr.count("error: ") == 1 and what in rank.stderr
    assert "--resume never" in rank.stderr
    assert (unfinished / "last.pt").read_bytes() == before


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_run_ddp_sh_saves_says_how_to_go_on_and_exits_with_128_plus_its_number(
    tiny_backbone, news_folder, tmp_path, number, status
):
    run = flags(tiny_backbone, news_folder, tmp_path / "c", *BATCH)
    run[run.index("--epochs") + 1] = "2000"
    command = ["bash", ROOT / "training" / "run_ddp.sh", *run]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [*map(str, command)], cwd=tmp_path, env=environment(NPROC_PER_NODE="2"),
            stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        until = time.monotonic() + 90
        while "epoch 2:" not in (tmp_path / "out").read_text() and time.monotonic() < until:
            time.sleep(0.1)
        began = time.monotonic()
        os.kill(process.pid, number)
        assert process.wait(60) == status
    said = (tmp_path / "out").read_text()
    assert time.monotonic() - began < 20
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert (tmp_path / "c" / "last.pt").exists()
