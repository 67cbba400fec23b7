"""The Dockerfile's own steps, as far as they go without Docker: pytest tests/test_image.py

What stays out: the base image itself, and a user that useradd makes. A virtual environment takes
the place of the one, a temporary folder that of /home/user; uid 1000 needs root to be taken.
"""

import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
import urllib.request
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ranks import ROOT, environment
from server import wait_until_healthy
from space_stand_in import SpaceStandIn

HEADLINE = b'{"text": "profit and shares of the bank"}'
USER = {"user": 1000, "group": 1000, "extra_groups": []} if os.geteuid() == 0 else {}


def parse(text):
    """[(instruction, rest)], comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", "").split("\n")]


def enters_the_build(path, patterns):
    """Whether a .dockerignore lets a file through: the last pattern that fits decides."""
    enters = True
    for pattern in patterns:
        if any(fnmatch(str(part), pattern.lstrip("!")) for part in (path, *path.parents)):
            enters = pattern.startswith("!")
    return enters


def python_of_an_ordinary_user():
    """One that uid 1000 may start: the tests' own can lie in root's home."""
    works = "import sys, ensurepip; sys.exit(sys.version_info < (3, 11))"
    for python in (sys._base_executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        try:
            if not subprocess.run([python, "-c", works], cwd="/", **USER).returncode:
                return python
        except OSError:
            pass
    pytest.skip("no Python >= 3.11 with venv that uid 1000 may start")


class Image:
    """Follows the Dockerfile of a checkout, one method for each instruction that it may have."""

    def __init__(self, checkout, place):
        self.checkout, self.home, self.venv = checkout, place / "home", place / "venv"
        self.env, self.folder, self.user, self.copied = {}, None, None, []
        text = (checkout / "Dockerfile").read_text().replace("/home/user", str(self.home))
        for instruction, rest in parse(text):
            step = getattr(self, f"do_{instruction.lower()}", None)
            assert step, f"the test does not know {instruction}: teach it"
            step(rest)
        for path in (self.home, *self.home.rglob("*")):
            path.chmod(path.stat().st_mode & 0o555)

    def expand(self, text):
        return string.Template(text).substitute(self.env)

    def do_from(self, rest):
        assert re.fullmatch(r"python:3\.\d+-slim", rest)
        python = python_of_an_ordinary_user()
        subprocess.run([python, "-m", "venv", self.venv], check=True, timeout=60)
        self.env["PATH"] = f"{self.venv}/bin:/usr/bin:/bin"

    def do_run(self, rest):
        if rest.startswith("useradd "):
            assert "--create-home --uid 1000 user" in rest  # what a Space runs as
            return self.home.mkdir()
        assert rest.startswith("pip install "), f"the test does not know RUN {rest}: teach it"
        # where packages come from is this machine's to say, so its settings and its HOME stay
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env |= self.env | {"HOME": os.environ["HOME"]}
        subprocess.run(rest, shell=True, cwd=self.folder, env=env, check=True, timeout=200)

    def do_user(self, rest):
        self.user = rest

    def do_env(self, rest):
        self.env |= {k: self.expand(v) for k, v in (s.split("=", 1) for s in shlex.split(rest))}

    def do_workdir(self, rest):
        self.folder = Path(self.expand(rest))
        self.folder.mkdir(parents=True)

    def do_copy(self, rest):
        owner, *sources, target = rest.split()
        assert owner == "--chown=user" and target.endswith("/")
        for source in sources:
            place = self.folder / target / Path(source).name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.checkout / source, place)
            if USER:
                os.chown(place, 1000, 1000)
        self.copied += sources

    def do_expose(self, rest):
        self.port = rest

    def do_healthcheck(self, rest):
        self.healthcheck = json.loads(rest.partition(" CMD ")[2])

    def do_cmd(self, rest):
        self.cmd = json.loads(rest)  # JSON is the exec form; the other runs under a shell

    def healthy(self, port, **extra):
        command = [part.replace(f":{self.port}/", f":{port}/") for part in self.healthcheck]
        done = subprocess.run(command, cwd=self.folder, env=self.env | extra, timeout=20,
                              capture_output=True, **USER)  # fmt: skip
        return done.returncode == 0


@pytest.fixture(scope="module")
def place():
    """A folder that uid 1000 can enter, as it cannot pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def checkout(place, exported):
    """What `docker build` would see: the code, and checkpoints/ with all that training left."""
    folder = place / "checkout"
    shutil.copytree(ROOT / "inference", folder / "inference")
    shutil.copytree(exported, folder / "checkpoints")
    for name in ("Dockerfile", ".dockerignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def image(place, checkout):
    return Image(checkout, place)


def test_the_build_gets_what_is_copied_and_nothing_else(image, checkout):
    lines = (checkout / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    files = {path.relative_to(checkout) for path in checkout.rglob("*") if path.is_file()}
    entered = {str(path) for path in files if enters_the_build(path, patterns)}
    assert entered == set(image.copied)
    assert Path("checkpoints/distilbert_agnews.pt") in files  # and stayed out


def test_the_image_has_neither_torch_nor_transformers(image):
    find = "import importlib.util as u; print(*map(u.find_spec, ['torch', 'transformers']))"
    done = subprocess.run([image.venv / "bin" / "python", "-c", find], capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout == "None None\n"


def test_the_images_packages_are_the_ones_that_the_tests_ran_with():
    lines = (ROOT / "inference" / "requirements.txt").read_text().splitlines()
    for line in (line for line in lines if not line.startswith("#")):
        wanted = Requirement(line)
        assert wanted.specifier.contains(version(wanted.name)), line


def test_the_image_serves_as_an_ordinary_user_from_folders_that_cannot_be_written(
    image, checkout, place
):
    assert image.user == "user" and image.port == "7860"
    assert image.cmd[-2:] == ["--port", "7860"]
    log = place / "server.log"
    with open(log, "w") as file:
        process = subprocess.Popen([*image.cmd[:-1], "0"], cwd=image.folder, env=image.env,
                                   stdout=file, stderr=file, **USER)  # fmt: skip
    try:
        url = wait_until_healthy(process, log)
        port = url.rpartition(":")[2]
        if USER:
            assert Path(f"/proc/{process.pid}").stat().st_uid == 1000
        assert image.healthy(port)
        assert image.healthy(port, http_proxy="http://127.0.0.1:9")  # one that does not answer
        request = urllib.request.Request(f"{url}/predict", HEADLINE)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == 200 and json.load(answer)["label"] == "Business"
        deployment_finds(url, checkout, place)
    finally:
        process.terminate()
        process.wait(10)  # Docker kills after 10 seconds
    assert not image.healthy(port)


def deployment_finds(url, checkout, place):
    """deploy_space.py gets its answer from the app itself, not from a stand-in of it."""
    with SpaceStandIn(place / "hub") as hub:
        hub.host, hub.lfs = url, ".none"
        env = environment(HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret", HF_HUB_OFFLINE="0")
        command = [sys.executable, checkout / "inference" / "deploy_space.py", "a/b"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    facts = json.loads((checkout / "checkpoints" / "distilbert_agnews.int8.json").read_text())
    assert f"{url} serves checkpoint {facts['info']['checkpoint']} and says: " in done.stdout
