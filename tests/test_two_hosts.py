"""Two hosts of two processes each, as network namespaces: pytest tests/test_two_hosts.py (root)"""

import re
import signal
import socket
import subprocess
import time

import pytest
import torch
from ranks import ROOT, environment, run, run_ranks

# the first host has the higher address: it holds rank 0 because of NODE_RANK, not of its address
NAMES, ADDRESSES = ("distrinews0", "distrinews1"), ("10.77.0.2", "10.77.0.1")
LAUNCHER = str(ROOT / "training" / "run_ddp.sh")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def remove_namespaces() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def network():
    """Two namespaces with a virtual cable between them; call it with "up" or "down"."""
    try:
        remove_namespaces()
        for name in NAMES:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    try:
        ends = ["veth0", "netns", NAMES[0], "type", "veth", "peer", "veth1", "netns", NAMES[1]]
        ip("link", "add", *ends)
        for host, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"veth{host}")
            for device in ("lo", f"veth{host}"):
                ip("-n", name, "link", "set", device, "up")
        yield lambda state: ip("-n", NAMES[0], "link", "set", "veth0", state)
    finally:
        for host in range(2):
            kill_host(host)
        remove_namespaces()


def kill_host(host: int) -> None:
    """Ends everything on it at once, as a power cut does."""
    subprocess.run(["kill", "-9", *ip("netns", "pids", NAMES[host]).split()], capture_output=True)


def start(folder, host: int, arguments, **extra) -> subprocess.Popen:
    """The README's command on one of the hosts; each has its own folder, as hosts have."""
    cwd = folder / f"host{host}"
    cwd.mkdir(exist_ok=True)
    env = environment(NNODES="2", NODE_RANK=str(host), MASTER_ADDR=ADDRESSES[0], NPROC_PER_NODE="2")
    env |= {"GLOO_SOCKET_IFNAME": f"veth{host}", "TIMEOUT": "15"} | extra
    command = ["ip", "netns", "exec", NAMES[host], "bash", LAUNCHER, *arguments]
    with open(cwd / "log", "w") as out:
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=out)


def log(folder, host: int) -> str:
    return (folder / f"host{host}" / "log").read_text()


def errors(folder, host: int) -> list[str]:
    return re.findall("error: another (?:rank|process)|Traceback", log(folder, host))


def finish(hosts, seconds=120) -> list[int]:
    until = time.monotonic() + seconds
    return [host.wait(max(0.1, until - time.monotonic())) for host in hosts]


def weights(folder):
    return torch.load(folder / "c" / "distilbert_agnews.pt")["model"]


def test_two_hosts_end_with_the_bits_of_one_with_as_many_processes(network, flags, tmp_path):
    arguments = flags("c", "--save-every", 2)
    hosts = [start(tmp_path, host, arguments, TIMEOUT="60") for host in (1, 0)]
    assert finish(hosts) == [0, 0], log(tmp_path, 0)
    assert not (tmp_path / "host1" / "c").exists()  # NODE_RANK=0 holds rank 0, which alone saves
    ranks = run_ranks(4, [ROOT / "training" / "train_ddp.py", *arguments], tmp_path)
    assert {rank.status for rank in ranks} == {0}, ranks[0].stderr
    two, one = weights(tmp_path / "host0"), weights(tmp_path)
    assert all(torch.equal(two[name], one[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["partition", "power cut", "SIGTERM"])
def test_both_hosts_end_together_and_the_same_command_resumes(network, flags, tmp_path, fault):
    arguments = flags("c", "--save-every", 2, "--epochs", 100, "--max-steps", 80)
    hosts = [start(tmp_path, host, arguments) for host in range(2)]
    last = tmp_path / "host0" / "c" / "last.pt"
    until = time.monotonic() + 90
    while not last.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert last.exists(), log(tmp_path, 0)
    if fault == "partition":
        network("down")
    elif fault == "power cut":
        kill_host(1)
    else:
        hosts[1].send_signal(signal.SIGTERM)  # saved on the other host, where rank 0 is
    began = time.monotonic()
    statuses = finish(hosts)
    assert time.monotonic() - began < 15 + 30
    if fault == "SIGTERM":
        assert statuses == [143, 143]
        assert "stopped and saved" in log(tmp_path, 0)
    for host in range({"partition": 2, "power cut": 1, "SIGTERM": 0}[fault]):
        assert statuses[host] == 1
        assert len(errors(tmp_path, host)) == 1, log(tmp_path, host)
    network("up")
    hosts = [start(tmp_path, host, arguments) for host in range(2)]
    assert finish(hosts) == [0, 0]
    assert "resuming from" in log(tmp_path, 0)
    assert (tmp_path / "host0" / "c" / "distilbert_agnews.pt").exists()


@pytest.mark.parametrize("wrong", ["address", "port", "no peer"])
def test_hosts_that_cannot_meet_say_so_in_one_line(wrong, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"NODE_RANK": "1", "MASTER_ADDR": "192.0.2.1"}  # reserved: nobody has it
        if wrong != "address":
            settings = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if wrong == "no peer":
            taken.close()
        done = run(["bash", LAUNCHER], tmp_path, NNODES="2", TIMEOUT="3", **settings)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "MASTER_ADDR" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
