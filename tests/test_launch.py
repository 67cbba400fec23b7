"""run_ddp.sh and its torchrun, with small fake ranks: pytest tests/test_launch.py

Several hosts are in test_two_hosts.py.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from ranks import ROOT, environment

SETTINGS = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS", "TIMEOUT")


@pytest.fixture
def launch(tmp_path):
    """Starts run_ddp.sh, with the given source in the place of train_ddp.py."""
    folder = tmp_path / "training"
    folder.mkdir()
    for name in ("run_ddp.sh", "torchrun.py", "machine.py"):
        shutil.copy(ROOT / "training" / name, folder)

    def start(rank="", prefix=(), stderr=subprocess.STDOUT, command=(), **env) -> subprocess.Popen:
        (folder / "train_ddp.py").write_text(rank)
        inherited = {k: v for k, v in environment().items() if k not in SETTINGS}
        command = command or [*prefix, "bash", folder / "run_ddp.sh"]
        settings = {"NPROC_PER_NODE": "2", "PYTHON": sys.executable} | env
        how = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True, "process_group": 0}
        return subprocess.Popen(command, cwd=tmp_path, env=inherited | settings, **how)

    return start


HOSTS = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("command", ["bash training/run_ddp.sh", "sh link"])
def test_odd_ways_to_start_find_the_scripts(launch, tmp_path, command):
    os.symlink(tmp_path / "training" / "run_ddp.sh", tmp_path / "link")
    (tmp_path / "elsewhere" / "training").mkdir(parents=True)
    odd = {"CDPATH": f"{tmp_path}/elsewhere:.", "PET_NNODES": "2", "NPROC_PER_NODE": "1"}
    process = launch("print('it ran')", command=command.split(), **odd)
    assert process.communicate(timeout=60)[0] == "it ran\n" and process.returncode == 0


def test_a_python_below_a_folder_with_an_equals_sign_is_started(launch, tmp_path):
    python = tmp_path / "a=b" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    process = launch("import machine; print('it ran')", PYTHON=str(python), PYTHONSAFEPATH="1")
    assert process.communicate(timeout=60)[0] == 2 * "it ran\n" and process.returncode == 0


@pytest.mark.parametrize(
    "setting, value",
    [
        *(("NPROC_PER_NODE", value) for value in ("0", "-1", "two", "1.5", "08")),
        *(("TIMEOUT", value) for value in ("0", "abc")),
        *(("NNODES", value) for value in ("0", "two")),
        *(("MAX_RESTARTS", value) for value in ("-1", "x", "3")),  # 3: not with several hosts
        *(("NODE_RANK", value) for value in ("", "2", "-1")),
        *(("MASTER_PORT", value) for value in ("0", "65536", "ssh")),
        ("MASTER_ADDR", ""),
        ("PYTHON", "/no/such/python"),
    ],
)
def test_a_wrong_setting_ends_in_one_line_with_status_2(launch, setting, value):
    process = launch(**HOSTS | {setting: value}, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and (setting in err or value in err)


@pytest.mark.parametrize(
    "with_torch, chosen",
    [
        (["bin/python", "bin/python3", ".venv/bin/python"], "bin/python"),  # the active one wins
        (["bin/python3", ".venv/bin/python"], "bin/python3"),
        ([".venv/bin/python"], ".venv/bin/python"),  # made by `make`, and not activated
        ([], None),
    ],
)
def test_the_python_is_the_first_that_has_torch(launch, tmp_path, with_torch, chosen):
    for name in ("bin/python", "bin/python3", ".venv/bin/python"):
        python = tmp_path / name
        python.parent.mkdir(parents=True, exist_ok=True)
        status = 0 if name in with_torch else 1
        python.write_text(f'#!/bin/sh\n[ "$1" != -c ] && echo "{name}" || exit {status}\n')
        python.chmod(0o755)
    process = launch(PATH=f"{tmp_path}/bin:/usr/bin:/bin", PYTHON="")
    out, _ = process.communicate(timeout=30)
    assert out == f"{chosen}\n" if chosen else out.count("\n") == 1 and out.startswith("error: ")
    assert process.returncode == (0 if chosen else 2)


ONE_CORE_BY_QUOTA = """
mkdir -p sys/cpu; mount --bind sys /sys/fs/cgroup
echo 100000 100000 > sys/cpu.max; echo 100000 > sys/cpu/cpu.cfs_quota_us
echo 100000 > sys/cpu/cpu.cfs_period_us; exec "$@"
"""


AFFINITY = ["sh", "-c", 'exec taskset -c "$(taskset -cp $$ | grep -o "[0-9]*$")" "$@"', "sh"]
CGROUP = ["unshare", "-m", "sh", "-ec", ONE_CORE_BY_QUOTA, "sh"]


@pytest.mark.parametrize(
    "prefix, given, expected", [(AFFINITY, "", "1"), (CGROUP, "", "1"), ((), "5", "5")]
)
def test_the_cores_that_may_be_used_are_divided_among_the_processes(
    launch, tmp_path, prefix, given, expected
):
    if subprocess.run([*prefix, "true"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("needs Linux, and root for the cgroup")
    rank = "import os; print(os.environ['OMP_NUM_THREADS'])"
    process = launch(rank, prefix, NPROC_PER_NODE="1", OMP_NUM_THREADS=given)
    assert process.communicate(timeout=60)[0] == f"{expected}\n"


FRESH_STORE = """
import os
import re
import torch.distributed as dist
dist.init_process_group("gloo")
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
os.write(1, f"found {store.check(['left by a former round'])}\\n".encode())  # in one piece
dist.barrier()
store.set("left by a former round", "")
os._exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""


def test_restarted_ranks_meet_in_an_empty_store(launch):
    process = launch(FRESH_STORE, MAX_RESTARTS="1")
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, out
    assert re.findall("found .*", out) == 4 * ["found False"]


FAILING = """
import os, pathlib, signal, sys, time
os.write(1, b"started\\n")  # in one piece
done = pathlib.Path(__file__).with_suffix("." + os.environ["TORCHELASTIC_RESTART_COUNT"])
if os.environ["RANK"] == "1":
    while not done.exists():
        time.sleep(0.02)
    {}
done.touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    "failure, restarts, status, out",
    [
        ("sys.exit(3)", "0", 3, ""),
        ("sys.exit(3)", "1", 3, "started\nstarted\n"),
        ("os.kill(os.getpid(), 9)", "0", 137, "error: rank 1 was killed by SIGKILL"),
        # what a rank does for an error that a restart would repeat
        ("os.kill(int(os.environ['LAUNCHER_PID']), signal.SIGVTALRM); time.sleep(60)", "1", 1, ""),
    ],
)
def test_a_failed_run_ends_with_the_rank_s_own_words_and_status(
    launch, failure, restarts, status, out
):
    process = launch(FAILING.format(failure), MAX_RESTARTS=restarts)
    printed = process.communicate(timeout=90)[0]
    assert process.returncode == status, printed
    assert printed.startswith(f"started\nstarted\n{out}")
    assert printed.count("\n") == 2 + out.count("\n") + out.startswith("error")


STOPPING = """
import os, signal, sys, time
received = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: received.append(number))
os.write(1, b"ready\\n")
until = time.monotonic() + 10
while not received and time.monotonic() < until:
    time.sleep(0.05)
if received:
    time.sleep(2)  # a long save
    os.write(1, f"saved after {len(received)}\\n".encode())
    os._exit(128 + received[0])
"""


def until_ready(process) -> None:
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]


def test_a_signal_during_the_last_save_stops_nothing(launch):
    finish = "os.kill(int(os.environ['LAUNCHER_PID']), signal.SIGURG); os._exit(0)"
    process = launch(STOPPING.replace("os._exit(128 + received[0])", finish))
    until_ready(process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, 2 * "saved after 1\n")


def test_the_host_s_own_name_need_not_resolve(launch):
    prefix = ["unshare", "--uts", "sh", "-c", 'hostname nosuchhost; exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("needs Linux, and root")
    process = launch("import os; print(os.environ['MASTER_ADDR'])", prefix, NPROC_PER_NODE="1")
    assert process.communicate(timeout=60)[0] == "127.0.0.1\n"


@pytest.mark.parametrize(
    "names", [["SIGTERM"], ["SIGHUP"], ["SIGUSR1"], ["SIGUSR2"], ["SIGINT", "SIGINT"]], ids=" ".join
)
def test_ranks_get_each_signal_and_the_time_to_save(launch, names):
    process = launch(STOPPING)
    until_ready(process)
    for name in names:
        process.send_signal(signal.Signals[name])
        time.sleep(0.5)
    out, _ = process.communicate(timeout=30)
    assert out == 2 * f"saved after {len(names)}\n"
    assert process.returncode == 128 + signal.Signals[names[0]]


def test_a_signal_that_comes_four_times_leaves_the_time_to_save(launch):
    process = launch(STOPPING)
    until_ready(process)
    for _ in range(4):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.02)
    t0 = time.monotonic()
    assert process.wait(30) == 128 + signal.SIGHUP
    assert time.monotonic() - t0 > 1.5  # a save takes 2 s
    assert process.communicate()[0].count("saved after") == 2


def test_under_nohup_a_closed_terminal_does_not_stop_the_run(launch):
    process = launch(STOPPING, prefix=["nohup"])
    out = process.stdout.readline()
    until_ready(process) if "nohup" in out else process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == 2 * "saved after 1\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_in_the_background_of_a_script_ctrl_c_for_another_program_is_not_heard(launch):
    process = launch(STOPPING, prefix=["sh", "-c", 'trap "" INT; exec "$@"', "sh"])
    until_ready(process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == 2 * "saved after 1\n"
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's own")
def test_ranks_end_when_torchrun_is_killed(launch):
    process = launch("import errors\nerrors.end_with_launcher()\n" + STOPPING)
    until_ready(process)
    process.kill()
    assert process.communicate(timeout=30)[0].count("saved") == 2  # both heard of it


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.15, 0.6, 1.5])
def test_ctrl_c_in_the_first_seconds_prints_no_traceback(launch, seconds):
    # the real ranks begin with this line, too
    process = launch("import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\n" + STOPPING)
    time.sleep(seconds)
    # a terminal sends it to all; the fake ranks, unlike real ones, are not prepared for it
    os.killpg(process.pid, signal.SIGINT) if seconds < 0.2 else process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert "Traceback" not in out and process.returncode in (130, -signal.SIGINT)
