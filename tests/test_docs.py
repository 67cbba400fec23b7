"""What the pages say exists, and runs: pytest tests/test_docs.py"""

import re
import subprocess
import sys

import pytest
from ranks import ROOT, environment

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/*.md")),
         ROOT / "training" / "sample_data" / "README.md"]  # fmt: skip
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code(text: str) -> list[str]:
    """The lines of shell blocks and all that stands in backticks."""
    blocks = "\n".join(re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL))
    return blocks.splitlines() + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text,
                                                                   flags=re.DOTALL))  # fmt: skip


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


@each_page
def test_links_lead_to_files_that_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@each_page
def test_files_that_are_named_exist(page):
    for piece in code(page.read_text()):
        for name in re.findall(r"(?<![\w./-])((?:training|inference|benchmarks|tests|docs)/[\w/.]+"
                               r"\.(?:py|sh|md|json|html|svg))", piece):  # fmt: skip
            assert (ROOT / name).exists(), name
        if re.fullmatch(r"test_\w+\.py", piece):
            assert (ROOT / "tests" / piece).exists(), piece


@each_page
def test_flags_that_are_named_exist(page):
    for piece in code(page.read_text()):
        for script, line in re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))([^#\n&|]*)", piece):
            script = script.replace("run_ddp.sh", "train_ddp.py")
            known = (ROOT / script).read_text() + (ROOT / "training/train_ddp.py").read_text()
            for flag in re.findall(r"--[a-z][\w-]+", line):
                assert f'"{flag}"' in known, f"{script} {flag}"
        for module, line in re.findall(r"python -m ([\w.]+)([^#\n]*)", piece):
            if module.startswith(("benchmarks", "tests", "inference")):
                path = ROOT / f"{module.replace('.', '/')}.py"
                for flag in re.findall(r"--[a-z][\w-]+", line):
                    assert f'"{flag}"' in path.read_text(), f"{module} {flag}"
        for target in re.findall(r"^make ([a-z]+)", piece):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


def test_the_marks_are_on_the_lines_that_the_readme_links():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\[(\d)\]\(training/train_ddp.py#L(\d+)\)", readme)
    assert [int(mark) for mark, _ in links] == [1, 2, 3, 4, 5, 6, 7]
    lines = (ROOT / "training" / "train_ddp.py").read_text().splitlines()
    for mark, line in links:
        assert f"# DDP {mark}/7: " in lines[int(line) - 1]


def test_messages_that_the_readme_explains_are_ones_that_the_code_has():
    sources = "".join(path.read_text() for folder in ("training", "inference")
                      for path in (ROOT / folder).glob("*.py"))  # fmt: skip
    section = (ROOT / "README.md").read_text().split("## Troubleshooting")[1].split("\n## ")[0]
    for message in re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)[1:]:
        for words in re.split(r"\d+|last\.pt|error: |SIG\w+", message):
            assert words.strip() in " ".join(sources.replace('"', "").split()), message


@pytest.mark.parametrize("page", [ROOT / "docs" / "ddp_explained.md"], ids=lambda page: page.name)
def test_python_that_stands_alone_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    alone = [block for block in blocks if "import" in block]
    assert alone
    for block in alone:
        subprocess.run([sys.executable, "-c", block], check=True)


EXPERIMENTS = ("no-set-epoch", "no-sampler", "wrong-rank-saves", "padded-evaluation",
               "no-averaging", "equal-seeds", "collective-in-if", "no-sync-forgotten",
               "undivided-accumulation")  # fmt: skip


def lab(*words: str) -> str:
    done = subprocess.run([sys.executable, "training/lab.py", *words], cwd=ROOT, env=environment(),
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lab_lists_its_experiments():
    assert tuple(line.split()[0] for line in lab().splitlines()) == EXPERIMENTS


def test_every_experiment_shows_the_damage():
    said = lab(*EXPERIMENTS)
    for name, right, broken in (
        ("no-set-epoch", "epoch: [█   ] 100", "epoch: [████] 100, 100, 100, 100"),
        ("no-sampler", "both ranks see: 0", "both ranks see: 400"),
        ("wrong-rank-saves", "that failed: 0", "that failed: "),
        ("padded-evaluation", "of 31: 31", "of 31: 32"),
        ("no-averaging", "] 0 to 0", "] 0."),
        ("equal-seeds", "treat alike, %: ", "treat alike, %: 100"),
        ("collective-in-if", "rank 0 got: a sum of 2", "rank 0 got: Timed out"),
        ("no-sync-forgotten", "of 4 micro-batches: ", "of 4 micro-batches: "),
        ("undivided-accumulation", "[████]", "[▁▂▄█]"),
    ):
        part = re.search(rf"^{name}: .*\n((?:    .*\n)+)", said, re.MULTILINE)[1]
        well, ill = re.split("^    broken", part, maxsplit=1, flags=re.MULTILINE)
        assert right in well and broken in ill, part
        assert re.findall(": (.*)", well) != re.findall(": (.*)", ill), part
