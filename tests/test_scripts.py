"""The two training scripts are one lesson: pytest tests/test_scripts.py"""

import difflib
import re
import subprocess
import sys

import pytest
from ranks import ROOT, run

SINGLE = (ROOT / "training" / "train_single.py").read_text().splitlines()
DDP = (ROOT / "training" / "train_ddp.py").read_text().splitlines()


def loop(script):
    start = next(n for n, line in enumerate(script) if line.startswith("    for epoch in range("))
    return script[start : script.index("    progress.close()")]


def test_at_most_65_lines_differ():
    changes = difflib.ndiff(SINGLE, DDP)
    assert len([line for line in changes if line[:2] in ("- ", "+ ")]) <= 65


@pytest.mark.parametrize("script", [SINGLE, DDP])
def test_the_loop_has_at_most_60_lines_and_8_helpers(script):
    ours = "utils|run_record|checkpoint|errors|dataset|machine|comm_hooks"
    calls = re.findall(rf"(?<!nn\.)\b(?:{ours})\.\w+\(", "\n".join(loop(script)))
    assert len(loop(script)) <= 60 and len({*calls}) <= 8


def test_the_seven_marks_first_come_in_order():
    numbers = re.findall(r"# DDP (\d)/7: ", "\n".join(DDP))
    first = [numbers.index(number) for number in "1234567"]  # a mark may come in two places
    assert first == sorted(first)
    assert not [line for line in SINGLE if "DDP " in line and "/7" in line]


def test_both_scripts_take_the_same_flags():
    one, two = (
        {*re.findall(r'^    add\("(--[a-z-]+)"', "\n".join(s), re.M)} for s in (SINGLE, DDP)
    )
    assert two - one == {"--backend", "--grad-compression", "--sparse-embeddings", "--profile"}
    assert one < two


def test_no_script_edits_sys_path_and_training_imports_nothing_from_the_other_folders():
    for path in (ROOT / "training").glob("*.py"):
        text = path.read_text()
        assert "sys.path" not in text
        assert not re.search(r"^\s*(from|import) (inference|benchmarks)", text, re.M)


@pytest.mark.parametrize(
    "cwd, command",
    [
        ("training", [sys.executable, "train_single.py"]),
        (".", ["torchrun", "--standalone", "--nproc-per-node", "2", "training/train_ddp.py"]),
        ("training", ["bash", "run_ddp.sh"]),
    ],
)
def test_every_documented_way_to_start_works(flags, tmp_path, cwd, command):
    (tmp_path / "repo").mkdir()
    subprocess.run(["cp", "-r", ROOT / "training", tmp_path / "repo"], check=True)
    command = [*command, *flags(tmp_path / "c", "--max-steps", 2)]
    done = run(command, tmp_path / "repo" / cwd, as_user=True, NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "distilbert_agnews.pt").exists()


def test_checkpoints_corrupted_in_twelve_ways_are_refused():
    command = [sys.executable, "-m", "tests.faults.corrupt", "--times", "12"]
    result = run(command, ROOT, as_user=True)
    assert "12 of 12 refused with one line; no code ran" in result.stdout, result.stderr
