"""A real server with the real app on loopback: `with server(checkpoints) as url:`."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from tests.ranks import ROOT, environment

UVICORN = [sys.executable, "-m", "uvicorn", "--port", "0", "--http", "h11"]
GUNICORN = [sys.executable, "-m", "gunicorn", "-k", "uvicorn_worker.UvicornWorker"]
GUNICORN += ["--bind", "127.0.0.1:0", "--no-control-socket"]


@contextmanager
def server(*args, **kwargs):
    """Its address, once /health says that it serves. The kernel chooses the port."""
    with process(*args, **kwargs) as (url, _):
        yield url


@contextmanager
def process(checkpoints: Path, *flags: str, command=UVICORN, app="inference.app:app", **extra: str):
    """(its address, the process, which leads a process group of its own)"""
    how = {"cwd": ROOT, "env": environment(CHECKPOINT_DIR=str(checkpoints), **extra)}
    log = checkpoints / "server.log"
    with open(log, "w") as file:
        how |= {"stdout": file, "stderr": file, "start_new_session": True}
        master = subprocess.Popen([*command, *flags, app], **how)
    try:
        yield wait_until_healthy(master, log), master
    finally:
        master.terminate()
        try:
            master.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(master.pid, signal.SIGKILL)
            raise


def wait_until_healthy(process: subprocess.Popen, log: Path, seconds=60) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        for mark in ("running on ", "Listening at: "):
            if mark in (text := log.read_text()):
                url = text.split(mark)[1].split()[0]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=60)
                    return url
                except urllib.error.URLError:  # the port is bound, and nobody listens yet
                    pass
        time.sleep(0.05)
    raise AssertionError(f"no server:\n{log.read_text()}")
