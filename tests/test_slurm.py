"""slurm.sbatch on a real Slurm: pytest tests/test_slurm.py (root, with slurm-wlm and munge)

Three network namespaces on a bridge are the hosts: n1 and n2 compute, ctl schedules.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ranks import ROOT, environment, losses, train

NODES = ("n1", "n2")
ADDRESSES = {"ctl": "10.79.0.3", "n1": "10.79.0.1", "n2": "10.79.0.2"}
# linuxproc finds a job's processes by their parents: cgroups differ from machine to machine
CONFIGURATION = """
ClusterName=distrinews
SlurmctldHost=ctl
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n[1-2] CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES OverSubscribe=FORCE
"""


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_for(condition, what: str, seconds: float = 60):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"{what} did not come within {seconds} s"
        time.sleep(0.02)
    return value


class Cluster:
    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, []

    def start(self) -> None:
        run("ip", "link", "add", "dnslurm", "type", "bridge")
        run("ip", "link", "set", "dnslurm", "up")
        for number, (host, address) in enumerate(ADDRESSES.items()):
            name = f"dnslurm-{host}"
            run("ip", "netns", "add", name)
            run("ip", "link", "add", f"dnslurm{number}", "type", "veth", "peer", "eth0",
                "netns", name)  # fmt: skip
            run("ip", "link", "set", f"dnslurm{number}", "master", "dnslurm", "up")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", name, "link", "set", device, "up")
        hosts = "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder))
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(64))
        (self.folder / "munge.key").chmod(0o600)
        files = [
            f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "pid", "seed")
        ]
        socket = f"--socket={self.folder}/munge.socket"
        self.daemon("ctl", "munged", "--foreground", "--force", socket, *files)
        wait_for((self.folder / "munge.socket").exists, "munged")
        self.daemon("ctl", "slurmctld", "-D")
        for node in NODES:
            self.daemon(node, "slurmd", "-D", "-N", node)
        wait_for(lambda: "2 idle" in self("sinfo", "-h", "-o", "%D %t", check=False), "both nodes")

    def on(self, host: str, *command) -> list[str]:
        """A command on one of the hosts, with their names in /etc/hosts."""
        inside = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/dnslurm-{host}", "unshare", "--uts", "--mount"]
        hosts = self.folder / "hosts"
        return [*enter, "sh", "-c", inside, host, str(hosts), *map(str, command)]

    def daemon(self, host: str, *command) -> None:
        with open(self.folder / f"{command[0]}.{host}.out", "w") as out:
            command = self.on(host, *command)
            env = self.environment()
            self.daemons.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))

    def environment(self) -> dict[str, str]:  # sbatch hands it on to the job
        conf = str(self.folder / "slurm.conf")
        return environment(SLURM_CONF=conf, NPROC_PER_NODE="1", GLOO_SOCKET_IFNAME="eth0")

    def __call__(self, *command, check=True) -> str:
        done = subprocess.run(
            self.on("ctl", *command), capture_output=True, text=True, cwd=ROOT,
            env=self.environment(),
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def stop(self) -> None:
        for host in ADDRESSES:
            pids = subprocess.run(["ip", "netns", "pids", f"dnslurm-{host}"], capture_output=True)
            subprocess.run(["kill", "-9", *pids.stdout.split()], capture_output=True)
            subprocess.run(["ip", "netns", "delete", f"dnslurm-{host}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", "dnslurm"], capture_output=True)
        for daemon in self.daemons:
            daemon.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in ("munged", "slurmctld", "slurmd", "ip") if not shutil.which(name)]
    if os.geteuid() or missing:
        pytest.skip(f"needs root and slurm-wlm, munge, iproute2; missing: {missing or 'root'}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.stop()  # what an interrupted run left
    try:
        try:
            run("ip", "netns", "add", "dnslurm-ctl")
        except AssertionError as error:
            pytest.skip(f"no network namespaces here: {error}")
        run("ip", "netns", "delete", "dnslurm-ctl")
        try:
            cluster.start()
        except AssertionError as error:
            logs = [path.read_text()[-500:] for path in sorted(cluster.folder.glob("*.out"))]
            pytest.skip(f"Slurm's daemons do not run here: {error}; {logs}")
        yield cluster
    finally:
        cluster.stop()


def flags(backbone: Path, news: Path, folder: Path) -> list:
    flags = ["--model", backbone, "--data", news, "--global-batch-size", 8, "--epochs", 12]
    flags += ["--save-every", 5, "--checkpoint-dir", folder / "c", "--report", folder / "record"]
    return [*map(str, flags)]


class Job:
    """slurm.sbatch on two nodes, with one process each."""

    def __init__(self, cluster: Cluster, backbone: Path, news: Path, folder: Path, *options: str):
        self.cluster, self.folder, self.log = cluster, folder, folder / "log"
        options = ["--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={self.log}", *options]
        script = ROOT / "training" / "cluster" / "slurm.sbatch"
        self.id = cluster("sbatch", *options, script, *flags(backbone, news, folder)).strip()

    def state(self, form: str = "%T") -> str:
        return self.cluster("squeue", "-h", "-j", self.id, "-t", "all", "-o", form).strip()

    def wait_for(self, *states: str) -> str:
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        state = wait_for(lambda: (s := self.state()) in (*states, *ended) and s, states, 120)
        assert state in states, f"{state}: {self.log.read_text(errors='replace')}"

    def ranks(self) -> list[int]:
        """The training processes on both nodes."""
        found = []
        for node in NODES:
            for pid in run("ip", "netns", "pids", f"dnslurm-{node}").split():
                try:
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:  # it has ended
                    continue
                if any(variable.startswith(b"RANK=") for variable in variables):
                    found.append(int(pid))
        return found

    def pause(self) -> None:
        """Stops the ranks after a save, so that a fast machine does not end before it is told."""
        last = self.folder / "c" / "last.pt"
        before = last.stat().st_mtime if last.exists() else 0
        self.wait_for("RUNNING")
        wait_for(lambda: last.exists() and last.stat().st_mtime > before, "a save", 90)
        for pid in self.ranks():
            os.kill(pid, signal.SIGSTOP)
        self.wait_for("RUNNING")

    def resume(self) -> None:
        for pid in self.ranks():
            os.kill(pid, signal.SIGCONT)


def test_an_interrupted_job_is_queued_again_and_resumes_with_the_same_losses(
    cluster, calm_backbone, news_folder, tmp_path
):
    options = ["--nodes=1-2", "--signal=B:USR1@60", "--time=30"]
    job = Job(cluster, calm_backbone, news_folder, tmp_path, *options)
    # (what ends the job, the state of the second node after it)
    for interruption, state in [("USR1", "DRAIN"), ("requeue", "RESUME"), ("time limit", "")]:
        job.pause()
        if interruption == "USR1":
            cluster("scancel", "--signal=USR1", job.id)
        elif interruption == "requeue":
            cluster("scontrol", "requeue", job.id)
        else:  # Slurm counts in minutes; the warning is to come in the future
            minutes, seconds = job.state("%M").split(":")
            limit = (60 * int(minutes) + int(seconds) + 75) // 60 + 1
            cluster("scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit}")
            wait_for(
                lambda: "slurm.sbatch: USR1" in job.log.read_text(errors="replace"),
                "the warning",
                90,
            )
        job.resume()
        job.wait_for("PENDING")
        if state:
            cluster("scontrol", "update", "NodeName=n2", f"State={state}", "Reason=test")
        # Slurm would wait for two minutes; a node refuses a job in the second of its end
        cluster("scontrol", "update", f"JobId={job.id}", "StartTime=now+3", "TimeLimit=30")
    job.wait_for("COMPLETED")
    log = job.log.read_text(errors="replace")
    assert log.count("stopped and saved at step") == log.count("resuming from") == 3
    assert log.count(f"saved {tmp_path}") == 1  # by rank 0 alone
    record = json.loads((tmp_path / "record").read_text())
    assert len(set(record["resumed_at"])) == 3
    assert re.findall(r"device: (\d) process", log) == ["2", "1", "2", "2"]
    # train_single.py; no dropout, whose masks differ by rank; in 168 steps rounding adds up
    (one,) = train(0, flags(calm_backbone, news_folder, tmp_path / "one"), tmp_path)
    assert [point["loss"] for point in record["curve"]] == pytest.approx(losses(one), abs=1e-4)
