"""What a run says, and how it ends early: errors in one line, stop signals, torchrun's death."""

import ctypes
import errno
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from tqdm import tqdm

NCCL_REMEDY = "on GPUs try NCCL_CUMEM_HOST_ENABLE=0, then NCCL_P2P_DISABLE=1 as well"
# Slurm warns by USR1, LSF by USR2
STOP_SIGNALS = [getattr(signal, f"SIG{name}") for name in "TERM INT HUP USR1 USR2".split()]
received_signals: list[int] = []  # see note_stop_signals


def discard_output(stream: int) -> None:
    """Stream 1 or 2 is broken: the terminal was closed, or Ctrl-C also ended `| tee log`. The run
    continues, and what was for it goes to the terminal if the other stream still does."""
    other = 3 - stream
    os.dup2(other if os.isatty(other) else os.open(os.devnull, os.O_WRONLY), stream)


class ProgressBar(tqdm):
    """tqdm over the steps, for a run that may outlive its terminal."""

    def __init__(self, total_steps: int, step: int, show: bool):
        seconds = 0.5 if sys.stderr.isatty() else 20  # in a log file every refresh is a line
        how = {"unit": "step", "dynamic_ncols": True, "mininterval": seconds}
        super().__init__(total=total_steps, initial=step, disable=not show, **how)

    def display(self, *args, **kwargs):
        try:
            return super().display(*args, **kwargs)
        except OSError:
            discard_output(2)

    def clear(self, *args, **kwargs):
        try:
            super().clear(*args, **kwargs)
        except OSError:
            discard_output(2)


def print0(text: str) -> None:
    """print() on rank 0 alone, above the progress bar."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    for _ in range(2):  # again, to where discard_output leads
        try:
            with tqdm.external_write_mode():
                return print(text, flush=True)
        except OSError:
            discard_output(1)


def same_command_resumes() -> str:
    without = " without --fresh" * ("--fresh" in sys.argv)  # which would delete that save
    return f"the same command{without} resumes from the last save"


def repair_output() -> None:
    """Text goes nowhere if its stream is closed, and what cannot be encoded is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")


def explain(error: BaseException, kinds: tuple) -> tuple[str | None, bool]:
    """(one line for an error that a user can cause, whether another process caused it)."""
    text = str(error)
    if isinstance(error, kinds):
        return text, False
    no_memory = re.search("can't allocate memory|CUDA error: out of memory|ALLOC_FAILED", text)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or no_memory:
        return "out of memory; use a smaller --micro-batch-size", False
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return f"{error.filename or 'writing a file'}: {error.strerror}", False
    no_gpu = "NVIDIA driver|cudaGetDeviceCount|No CUDA GPUs|busy or unavailable|CUDA unknown error"
    if re.search(no_gpu, text):  # device_count() had asked NVML, which opens none
        return f"{text.splitlines()[0]}; to train on the CPU: CUDA_VISIBLE_DEVICES=", False
    if "no kernel image is available" in text:
        return "this torch has no code for this GPU; see https://pytorch.org/get-started", False
    if "Unable to find address for: " in text:  # gloo on a host without this interface
        name = text.split("Unable to find address for: ")[1].split()[0]
        return f"GLOO_SOCKET_IFNAME={name}: this host has no such interface; see: ip address", False
    if "EADDRINUSE" in text:
        return "another program took the port that torchrun had chosen; start it again", False
    of_torch = isinstance(error, dist.DistStoreError | dist.DistNetworkError)
    of_others = isinstance(error, RuntimeError) and re.search("gloo|nccl|connection", text, re.I)
    if not (of_torch or of_others):
        return None, False
    if "NCCL error" in text and "ncclRemoteError" not in text:  # remote: the other process exited
        return f"NCCL failed ({text.strip().splitlines()[-1]}); {NCCL_REMEDY}", False
    cause = "another process exited"
    if "timed out" in text.lower() or "timeout" in text.lower():
        seconds = os.environ.get("TIMEOUT") or 600
        cause = f"another rank did not reach a collective within {seconds} s: it hangs, or the "
        cause += "network between the hosts is down"
    return f"{cause}; {same_command_resumes()}", True


@contextmanager
def one_line_errors(*kinds: type[Exception]):
    """Prints an error that a user can cause as one line, once, and exits with status 1.

    When one rank fails, the collectives of the others fail too, and torchrun ends them within
    seconds. So rank 0 of each host speaks at once, other ranks after 3 s, and ranks that fail
    because another one did after 10 and 13 s: so the cause is what the user reads.
    """
    repair_output()
    try:
        yield
    except KeyboardInterrupt:
        print0(f"stopped at once; {same_command_resumes()}")
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        line, caused_elsewhere = explain(error, kinds)
        under_torchrun = {"TORCHELASTIC_RUN_ID", "LOCAL_RANK"} <= os.environ.keys()
        if under_torchrun:
            if caused_elsewhere and signal.SIGTERM in received_signals:
                os._exit(1)  # torchrun is ending all ranks: another one has told the cause
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10 * caused_elsewhere + 3 * (os.environ["LOCAL_RANK"] != "0"))
        launcher = int(os.environ.get("LAUNCHER_PID", os.getppid()))  # see torchrun.py
        if os.getppid() != launcher:
            os._exit(1)  # another rank has told the cause, and the run has ended
        with tqdm.external_write_mode():  # removes the progress bar, which must not come back
            text = f"error: {line}" if line else "".join(traceback.format_exception(error))
            with suppress(OSError):  # the terminal was closed
                print(text.rstrip(), file=sys.stderr, flush=True)
            if isinstance(error, kinds) and "LAUNCHER_PID" in os.environ:
                # a restart would meet the same error: torchrun.py ends all ranks at this signal
                os.kill(launcher, signal.SIGVTALRM)
            os._exit(1)  # an orderly exit can wait for ranks that are gone


def note_stop_signals() -> list[int]:
    """From now on a stop signal only adds its number to the returned list, received_signals.

    The training loop finishes its step, saves and exits. A second Ctrl-C ends the process at once.
    """
    first_at = 0.0

    def note(number: int, frame) -> None:
        nonlocal first_at
        if not received_signals:
            received_signals.append(number)
            first_at = time.monotonic()
            if not dist.is_initialized() or dist.get_rank() == 0:
                name = signal.Signals(number).name
                text = f"\n{name}: saving soon (Ctrl-C again: end without saving)\n"
                for _ in range(2):
                    try:
                        os.write(1, text.encode())  # print() may itself have been interrupted
                        break
                    except OSError:
                        discard_output(1)
        # torchrun passes a second Ctrl-C on as SIGTERM, and at its death the kernel sends one.
        # Within a second it is the same event: the kernel, and Slurm, can send it twice.
        elif signal.SIGINT in (received_signals[0], number) and time.monotonic() - first_at > 1:
            raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, note)
    return received_signals


def exit_stopped(received: list[int], step: int) -> None:
    """Ends the process with 128 + the signal's number, as a shell would report it."""
    print0(f"stopped and saved at step {step}; {same_command_resumes()}")
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # a barrier on the CPU: rank 0 has saved
    os._exit(128 + (received or [signal.SIGTERM])[0])  # another rank may be the one that got it


def end_with_launcher() -> None:
    """On Linux, has the kernel send this rank SIGTERM when torchrun dies, even by SIGKILL.

    Otherwise the rank would keep training, unnoticed, next to the run that is started next.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ.get("LAUNCHER_PID", os.getppid())):
            os._exit(1)  # torchrun died before the request
