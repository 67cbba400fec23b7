"""A real uvicorn with the real app on loopback: `with server(checkpoints) as url:`."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from tests.ranks import ROOT, environment


@contextmanager
def server(checkpoints: Path, **extra: str):
    """Its address, once /health says that it serves. The port is chosen by the kernel."""
    command = [sys.executable, "-m", "uvicorn", "inference.app:app", "--port", "0"]
    env = environment(CHECKPOINT_DIR=str(checkpoints), DRAIN_SECONDS="0", **extra)
    log = checkpoints / "server.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
    try:
        yield wait_until_healthy(process, log)
    finally:
        process.terminate()
        process.wait(20)


def wait_until_healthy(process: subprocess.Popen, log: Path, seconds=60) -> str:
    until, mark = time.monotonic() + seconds, "running on "
    while time.monotonic() < until and process.poll() is None:
        if mark in (said := log.read_text()):
            url = said.split(mark)[1].split()[0]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                return url
            except urllib.error.HTTPError:  # 503: it loads the model
                pass
        time.sleep(0.05)
    raise AssertionError(f"no server:\n{log.read_text()}")
