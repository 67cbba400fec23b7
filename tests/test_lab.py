"""Each experiment of the lab shows its damage: pytest tests/test_lab.py"""

import re
import sys

import pytest
from ranks import ROOT, run

# experiment: (found in the right variant, found in the broken one)
SHOWN = {
    "no-sampler": ("both ranks see: 0", "both ranks see: 400"),
    "no-set-epoch": ("%: [█   ] 100", "%: [████] 100, 100, 100, 100"),
    "no-averaging": ("] 0 to 0", "] 0."),
    "unused-parameters": ("error: none", "error: Expected to have finished reduction"),
    "no-buffer-broadcast": ("running means: 0", "running means: 0."),
    "no-sync-forgotten": ("of 4 micro-batches: ", "of 4 micro-batches: "),
    "undivided-accumulation": ("[████]", "[▁▂▄█]"),
    "equal-seeds": ("treat alike, %: ", "treat alike, %: 100"),
    "padded-evaluation": ("of 31: 31", "of 31: 32"),
    "collective-in-if": ("rank 0 got: a sum of 2", "rank 0 got: Timed out"),
    "not-atomic": ("30 times: 0", "30 times: "),
}


def lab(*names: str) -> str:
    done = run([sys.executable, "training/lab.py", *names], ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_without_a_name_it_lists_the_experiments():
    assert [line.split()[0] for line in lab().splitlines()] == list(SHOWN)


@pytest.fixture(scope="module")
def tour() -> str:
    return lab("tour")


@pytest.mark.parametrize("name", SHOWN)
def test_the_experiment_shows_the_damage(tour, name):
    right, broken = SHOWN[name]
    part = re.search(rf"^{name}: .*\n((?:    .*\n)+)", tour, re.MULTILINE)[1]
    right_part, broken_part = re.split("^    broken", part, maxsplit=1, flags=re.MULTILINE)
    assert right in right_part and broken in broken_part, part
    figures = re.findall("(?:right |broken)  .*: (.*)", part)
    assert figures[: len(figures) // 2] != figures[len(figures) // 2 :], part
