"""What the Dockerfile copies and installs is enough to serve: pytest tests/test_image.py

A virtual environment takes the place of the base image. uid 1000 needs root to be taken.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
from ranks import ROOT
from server import wait_until_healthy

from inference import deploy_space

pytestmark = pytest.mark.slow

USER = {"user": 1000, "group": 1000, "extra_groups": []} if os.geteuid() == 0 else {}
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
COPIES = re.findall(r"^COPY --chown=user (.+) (\S+/)$", DOCKERFILE, re.MULTILINE)
COPIED = {source for sources, _ in COPIES for source in sources.split()}
COMMAND = json.loads(re.search(r"^CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)[1])
HEALTHCHECK = json.loads(re.search(r"^HEALTHCHECK .* CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)[1])


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


@pytest.fixture(scope="module")
def image(exported):
    """(venv, folder of the app) with what the Dockerfile installs and copies, read-only."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        place.chmod(0o755)  # uid 1000 cannot enter pytest's own
        subprocess.run([python_of_an_ordinary_user(), "-m", "venv", place / "venv"], check=True)
        pip = [place / "venv" / "bin" / "python", "-m", "pip", "install", "-q"]
        pip += ["-r", ROOT / "inference" / "requirements.txt", "-c", ROOT / "constraints.txt"]
        subprocess.run(pip, check=True, timeout=250)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deploy_space, "CHECKPOINTS", exported)
            deploy_space.collect(place / "app")
        for path in (place / "app", *(place / "app").rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield place / "venv", place / "app"


def test_the_build_gets_what_is_copied_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    assert {f"!{name}" for name in COPIED} == set(patterns[1:])


def test_the_image_serves_as_an_ordinary_user_from_folders_that_cannot_be_written(image):
    venv, app = image
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = str(chosen.getsockname()[1])
    settings = dict(
        line.split("=", 1)
        for line in re.search(r"^ENV (PYTHONUNBUFFERED=.+)$", DOCKERFILE, re.MULTILINE)[1].split()
    )
    assert settings["PORT"] == re.search(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)[1]
    env = settings | {"PATH": f"{venv}/bin:/usr/bin:/bin", "HOME": "/nonexistent", "PORT": port}

    def healthy(**extra):
        return not subprocess.run(HEALTHCHECK, env=env | extra, capture_output=True).returncode

    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(COMMAND, cwd=app, env=env, stdout=log, stderr=log, **USER)
        try:
            url = wait_until_healthy(process, Path(log.name))
            assert url.endswith(f":{port}")
            if USER:
                assert Path(f"/proc/{process.pid}").stat().st_uid == 1000
            assert healthy() and healthy(http_proxy="http://127.0.0.1:9")  # a dead proxy
            request = urllib.request.Request(f"{url}/predict", b'{"text": "profit of the bank"}')
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert answer.status == 200 and json.load(answer)["label"] == "Business"
        finally:
            process.terminate()
            process.wait(10)  # Docker kills after 10 seconds
        assert not healthy()
