"""What the pages say exists, and runs: pytest tests/test_docs.py"""

import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from ranks import ROOT, run
from server import server

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
    ROOT / "training" / "sample_data" / "README.md",
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """The lines of shell blocks without comments, and all that stands in backticks."""
    shell = "".join(lines for kind, lines in BLOCK.findall(text) if kind in ("bash", ""))
    lines = [re.sub(r"(^|\s+)# .*", "", line) for line in shell.splitlines()]
    return [line for line in lines if line] + re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


@each_page
def test_links_lead_to_files_that_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@each_page
def test_files_that_are_named_exist(page):
    for piece in code(page.read_text()):
        for name in re.findall(
            r"(?<![\w./-])((?:training|inference|benchmarks|tests|docs)/[\w/.]+"
            r"\.(?:py|sh|md|json|html|svg))",
            piece,
        ):
            assert (ROOT / name).exists(), name
        if re.fullmatch(r"test_\w+\.py", piece):
            assert (ROOT / "tests" / piece).exists(), piece


@each_page
def test_flags_that_are_named_exist(page):
    # but for the commands of records, which may be older than the scripts
    text = re.sub(r"^Written by `make report`.*", "", page.read_text(), flags=re.MULTILINE)
    for piece in code(text):
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


def test_messages_that_the_readme_explains_are_ones_that_the_code_has():
    sources = "".join(
        path.read_text()
        for folder in ("training", "inference")
        for path in (ROOT / folder).glob("*.py")
    )
    section = (ROOT / "README.md").read_text().split("## Troubleshooting")[1].split("\n## ")[0]
    for message in re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)[1:]:
        for words in re.split(r"\d+|last\.pt|error: |SIG\w+", message):
            assert words.strip() in " ".join(sources.replace('"', "").split()), message


# Commands: what is added so that one is quick, or in capitals what it needs that is not here

SHORT = "--max-steps 2 --max-eval-samples 8 --checkpoint-dir {out}"
QUICK = {
    r"python training/train_single.py": "A RUN, as test_scripts.py has",
    r"bash training/run_ddp.sh": "A RUN, as test_scripts.py has",
    r"bash training/run_ddp.sh --data sample --model packaged (?!.*--profile).*": SHORT,
    r"bash training/run_ddp.sh .*--profile traces": "A RUN, as test_profiler.py has",
    r"bash training/run_ddp.sh --model packaged --lr 0.0002 --epochs 3": "AN HOUR",
    r"(python training/train_single.py|bash training/run_ddp.sh) .*--report .*": "AN HOUR",
    r"NNODES=2 NODE_RANK=0.*": "TWO HOSTS, as test_two_hosts.py has",
    r"python training/lab.py.*": "A RUN, as test_lab.py has",
    r"diff training/.*": "",
    r"python inference/export.py --to hf": "--checkpoint-dir {exported}",
    r"python inference/export.py --to int8": "A RUN, as the fixture `exported` has",
    r"python inference/deploy_space.py OWNER/NAME --dry-run": "AN EXPORT, as test_deploy.py has",
    r"python inference/deploy_space.py OWNER/NAME": "AN ACCOUNT",
    r"python -m (benchmarks|tests)\..*": "--help",
    r"make [a-z]+.*": "--dry-run",
    r"curl localhost:7860/predict .*": "",
    r"!?git clone .*": "AN ACCOUNT",
    r"kaggle kernels .*": "AN ACCOUNT",
    r"hf auth login": "AN ACCOUNT",
    r"docker (build|push) .*": "DOCKER",
    r"pip install .*": "THE NETWORK, and is in the Makefile",
}
STARTS = "python bash make curl pip kaggle docker git diff NNODES=2 hf torchrun !git".split()
COMMANDS = sorted(
    {x for page in PAGES for x in code(page.read_text()) if x.split(" ")[0] in STARTS and " " in x}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command, exported, tmp_path, monkeypatch):
    [quick] = [more for pattern, more in QUICK.items() if re.fullmatch(pattern, command)]
    if quick[:1].isupper():
        pytest.skip(f"needs {quick}")
    if quick == "--help":  # in this process, where torch is imported already
        _, _, module, *words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [module, *words, quick])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(ROOT / f"{module.replace('.', '/')}.py", run_name="__main__")
        return
    more = quick.format(out=tmp_path, exported=exported)
    if command.startswith("curl"):
        with server(exported) as url:
            command = command.replace("localhost:7860", url) + " --fail --silent"
            said = subprocess.run(command, shell=True, check=True, capture_output=True).stdout
        assert json.loads(said)["label"] in ("World", "Sports", "Business", "Sci/Tech")
        return
    done = run(["bash", "-c", f"{command} {more}"], ROOT, NPROC_PER_NODE="2")
    differs = command.startswith("diff")
    assert done.returncode == differs, done.stdout + done.stderr


def test_the_benchmark_starts_outside_of_pytest():
    """pytest's own import path would hide a module that it does not find."""
    command = [sys.executable, "-m", "benchmarks.bench_training", "--help"]
    done = run(command, ROOT, as_user=True)
    assert done.returncode == 0, done.stderr


def test_python_that_stands_alone_runs():
    text = (ROOT / "docs" / "ddp_explained.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    alone = [block for block in blocks if "import" in block]
    assert alone
    for block in alone:
        subprocess.run([sys.executable, "-c", block], check=True)
