"""What every test shares: a backbone, news rows, a way to run the scripts."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from fakes import make_backbone, make_news
from filelock import FileLock
from ranks import ROOT, environment, run

# the longest files begin first, so that no worker of xdist is left with one at the end
LONGEST = (
    "slurm docs one_order launch export resume api faulty_rank two_hosts marks hub scripts deploy"
)
LONGEST += " lab ddp page comm_hooks report bad_input profiler kubernetes"


def pytest_configure(config):
    os.environ["no_proxy"] = "127.0.0.1,localhost"  # a proxy does not reach the tests' servers
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:  # behind nohup or `&`; programs inherit that
            signal.signal(number, lambda *_: None)
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the other tests compare with results of a CPU


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("tiny"), 0.1)


@pytest.fixture(scope="session")
def calm_backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("calm"), 0.0)


@pytest.fixture(scope="session")
def flags(tiny_backbone, news_folder):
    """flags(checkpoints, *more): those of a small run, two epochs of 14 steps."""
    common = ["--model", tiny_backbone, "--data", news_folder, "--global-batch-size", 8]
    common += ["--max-eval-samples", 20, "--checkpoint-dir"]
    return lambda checkpoints, *more: [*map(str, [*common, checkpoints, *more])]


@pytest.fixture(scope="session")
def news_folder(tmp_path_factory):
    return make_news(tmp_path_factory.mktemp("news"))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): a folder that make(folder) fills in the first of xdist's workers; the
    others get a copy."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made_once(name, make):
        folder = tmp_path_factory.mktemp(name) / "c"
        with FileLock(base / f"{name}.lock"):
            if (base / name).exists():
                return shutil.copytree(base / name, folder)
            make(folder)
            shutil.copytree(folder, base / name)
            return folder

    return made_once


@pytest.fixture(scope="session")
def trained(tiny_backbone, news_folder, made_once):
    """A checkpoint folder as train_single.py leaves it."""

    def make(folder):
        command = [sys.executable, ROOT / "training" / "train_single.py", "--model", tiny_backbone]
        command += ["--data", news_folder, "--checkpoint-dir", folder, "--lr", "5e-3"]
        command += ["--epochs", 20, "--global-batch-size", 8, "--dropout", 0]
        ignored = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
        done = run(command, folder.parent, 280, TIMEOUT="30m", **ignored)
        assert done.returncode == 0, done.stdout + done.stderr

    return made_once("trained", make)


@pytest.fixture(scope="session")
def exported(trained, news_folder, made_once):
    """A copy of `trained` with the int8 files that export.py writes."""

    def make(folder):
        command = [sys.executable, ROOT / "inference" / "export.py", "--to", "int8"]
        env = environment(CHECKPOINT_DIR=str(shutil.copytree(trained, folder)))
        del env["PYTHONPATH"]  # a user has none
        command = [*map(str, [*command, "--data", news_folder])]
        subprocess.run(command, cwd="/", env=env, check=True, timeout=280, umask=0o077)

    return made_once("exported", make)
