"""The two training scripts are one lesson: pytest tests/test_scripts.py"""

import difflib
import re
import subprocess
import sys

import pytest
from ranks import ROOT, environment

SINGLE = (ROOT / "training" / "train_single.py").read_text().splitlines()
DDP = (ROOT / "training" / "train_ddp.py").read_text().splitlines()


def test_at_most_80_lines_differ():
    changes = difflib.ndiff(SINGLE, DDP)
    assert len([line for line in changes if line[:2] in ("- ", "+ ")]) <= 80


def test_the_seven_marks_stand_once_each_and_in_order():
    marks = [line for line in DDP if line.strip().startswith("# DDP ")]
    assert [re.match(r"\s*# DDP (\d)/7: ", mark)[1] for mark in marks] == list("1234567")
    assert not [line for line in SINGLE if "DDP " in line and "/7" in line]


def help_of(script, cwd):
    done = subprocess.run(
        [sys.executable, str(ROOT / "training" / script), "--help"],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    return set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.M))


def test_both_scripts_take_the_same_flags(tmp_path):
    more = {"--backend", "--grad-compression", "--sparse-embeddings"}
    assert help_of("train_ddp.py", tmp_path) - help_of("train_single.py", tmp_path) == more


def test_no_script_edits_sys_path_and_training_imports_nothing_from_the_other_folders():
    for path in (ROOT / "training").glob("*.py"):
        text = path.read_text()
        assert "sys.path" not in text
        assert not re.search(r"^\s*(from|import) (inference|benchmarks)", text, re.M)


@pytest.mark.parametrize(
    "cwd, command",
    [
        (".", [sys.executable, "training/train_single.py"]),
        ("training", [sys.executable, "train_single.py"]),
        (".", ["torchrun", "--standalone", "--nproc-per-node", "2", "training/train_ddp.py"]),
        ("training", ["bash", "run_ddp.sh"]),
    ],
)
def test_every_documented_way_to_start_works(tiny_backbone, news_folder, tmp_path, cwd, command):
    (tmp_path / "repo").mkdir()
    subprocess.run(["cp", "-r", ROOT / "training", tmp_path / "repo"], check=True)
    flags = ["--model", tiny_backbone, "--data", news_folder, "--max-steps", 2,
             "--max-eval-samples", 8, "--checkpoint-dir", tmp_path / "c"]  # fmt: skip
    env = environment(NPROC_PER_NODE="2")
    del env["PYTHONPATH"]  # a user has none
    done = subprocess.run(
        [*map(str, command + flags)], cwd=tmp_path / "repo" / cwd, env=env,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "distilbert_agnews.pt").exists()
