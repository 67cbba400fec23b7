"""Two hosts of two processes each, as network namespaces: pytest tests/test_two_hosts.py (root)"""

import os
import re
import signal
import socket
import subprocess
import time

import pytest
import torch
from ranks import ROOT, environment

NAMES, ADDRESSES = ("distrinews0", "distrinews1"), ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def wire():
    """Two namespaces with a virtual wire between them."""
    try:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("making network namespaces needs root and iproute2")
    try:
        ip("link", "add", "wire0", "netns", NAMES[0], "type", "veth", "peer", "name", "wire1",
           "netns", NAMES[1])  # fmt: skip
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"wire{number}")
            for device in ("lo", f"wire{number}"):
                ip("-n", name, "link", "set", device, "up")
        yield lambda state: ip("-n", NAMES[0], "link", "set", "wire0", state)
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def flags(backbone, news, *more):
    common = ["--model", backbone, "--data", news, "--epochs", 2, "--global-batch-size", 8,
              "--save-every", 2, "--max-eval-samples", 20]  # fmt: skip
    return [*map(str, [*common, *more])]


def start(folder, host: int, arguments, **extra) -> subprocess.Popen:
    """The README's command on one of the hosts; each has its own folder, as hosts have."""
    own = folder / f"host{host}"
    own.mkdir(exist_ok=True)
    env = environment(NNODES="2", NODE_RANK=str(host), MASTER_ADDR=ADDRESSES[0], NPROC_PER_NODE="2",
                      GLOO_SOCKET_IFNAME=f"wire{host}", TIMEOUT="10", **extra)  # fmt: skip
    command = ["ip", "netns", "exec", NAMES[host], "bash", str(ROOT / "training" / "run_ddp.sh"),
               *arguments, "--checkpoint-dir", "c"]  # fmt: skip
    with open(own / "log", "a") as log:
        return subprocess.Popen(command, cwd=own, env=env, stdout=log, stderr=log,
                                start_new_session=True)  # fmt: skip


def finish(processes, seconds=120) -> list[int]:
    until = time.monotonic() + seconds
    try:
        return [one.wait(max(0.1, until - time.monotonic())) for one in processes]
    finally:
        for one in processes:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)


def weights(folder):
    return torch.load(folder / "distilbert_agnews.pt")["model"]


def test_two_hosts_end_with_the_bits_of_one_with_as_many_processes(
    wire, tiny_backbone, news_folder, tmp_path
):
    arguments = flags(tiny_backbone, news_folder)
    hosts = [start(tmp_path, host, arguments) for host in range(2)]
    assert finish(hosts) == [0, 0], (tmp_path / "host0" / "log").read_text()
    assert not (tmp_path / "host1" / "c").exists()  # rank 0 alone saves
    command = ["bash", str(ROOT / "training" / "run_ddp.sh"), *arguments, "--checkpoint-dir", "c"]
    subprocess.run(command, cwd=tmp_path, env=environment(NPROC_PER_NODE="4"), check=True)
    there, here = weights(tmp_path / "host0" / "c"), weights(tmp_path / "c")
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_a_cut_wire_ends_both_sides_and_the_same_command_goes_on(
    wire, tiny_backbone, news_folder, tmp_path
):
    arguments = flags(tiny_backbone, news_folder, "--epochs", 100, "--max-steps", 500)
    hosts = [start(tmp_path, host, arguments) for host in range(2)]
    last = tmp_path / "host0" / "c" / "last.pt"
    until = time.monotonic() + 60
    while not last.exists() and time.monotonic() < until:
        time.sleep(0.1)
    wire("down")
    began = time.monotonic()
    statuses = finish(hosts)
    assert time.monotonic() - began < 10 + 30
    for host in range(2):
        said = (tmp_path / f"host{host}" / "log").read_text().strip().splitlines()
        assert statuses[host] == 1
        # the ranks' collective, or on the second host the launcher's store, whichever is first
        assert re.match("error: (another rank did not come|the hosts' common store)", said[-1])
    assert last.exists()
    wire("up")
    hosts = [start(tmp_path, host, arguments) for host in range(2)]
    assert finish(hosts) == [0, 0]
    assert "resuming from" in (tmp_path / "host0" / "log").read_text()
    assert (tmp_path / "host0" / "c" / "distilbert_agnews.pt").exists()


@pytest.mark.parametrize("ill", ["address", "port"])
def test_hosts_that_cannot_meet_say_so_in_one_line(ill, tiny_backbone, news_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        meet = {"NODE_RANK": "1", "MASTER_ADDR": "192.0.2.1"}  # reserved: nobody has it
        if ill == "port":
            meet = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            ["bash", ROOT / "training" / "run_ddp.sh", *flags(tiny_backbone, news_folder)],
            cwd=tmp_path, env=environment(NNODES="2", TIMEOUT="3", **meet),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert "error: the hosts' common store does not answer (" in done.stderr
    assert "Traceback" not in done.stderr
