"""torchrun, which run_ddp.sh starts; a failed run ends with its cause and the rank's exit status.

torchrun is `torch.distributed.run.main`. When a rank fails, torchrun logs a summary and a traceback
of its own below the line that the rank has printed, and exits with 1.
"""

try:
    import signal

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is behind a script's `&`
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # run_ddp.sh blocked it
except KeyboardInterrupt:
    raise SystemExit(130) from None

import logging
import os
import sys

from machine import cores

LOG_VARIABLES = "LOGLEVEL TORCH_LOGS TORCH_CPP_LOG_LEVEL TORCH_DISTRIBUTED_DEBUG NCCL_DEBUG"


def main() -> int | str:
    os.environ["LAUNCHER_PID"] = str(os.getpid())  # see end_with_launcher in errors.py
    # torchrun forwards these to all ranks and waits while they finish their step and save. VTALRM
    # comes from a rank (below). What nohup or a script's `&` ignores is kept.
    names = "INT TERM QUIT HUP USR1 USR2 VTALRM".split()
    numbers = (getattr(signal, f"SIG{name}") for name in names)
    heard = [n.name for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
    os.environ["PET_SIGNALS_TO_HANDLE"] = ",".join(heard)
    if not os.environ.get("OMP_NUM_THREADS"):  # torchrun would set 1: on a CPU cores would idle
        processes = int(sys.argv[sys.argv.index("--nproc-per-node") + 1])
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // processes))
    if not any(name in os.environ for name in LOG_VARIABLES.split()):
        logging.disable(logging.ERROR)
        # for the ranks, too: NCCL's watchdog prints lines of C++ above the one that tells the cause
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if "--standalone" in sys.argv:  # the host's own name may not resolve, as in a container
        os.environ.setdefault("PET_LOCAL_ADDR", "127.0.0.1")
    close = PContext.close  # it gives ranks 30 s after a signal, too few for a step and a save

    def close_patiently(self, death_sig=None, timeout=30):
        if death_sig:
            timeout = max(timeout, 300)
            # one more would end the waiting
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
        close(self, death_sig, timeout)

    PContext.close = close_patiently
    finished = []  # a rank says so by SIGURG, which does nothing where nobody handles it
    signal.signal(signal.SIGURG, lambda *_: finished.append(True))
    sys.unraisablehook = lambda _: None  # a second Ctrl-C can strike in the middle of a finalizer
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            seconds = os.environ.get("TIMEOUT") or 600
            hints = {
                "SIGKILL": " (by the kernel, if memory ran out)",
                "SIGABRT": f" (by NCCL, if another rank kept it waiting for {seconds} s)",
            }
            print(f"error: rank {rank} was killed by {name}{hints.get(name, '')}", file=sys.stderr)
        return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    except SignalException as error:
        if finished:  # a signal during the last evaluation or save stopped nothing
            return 0
        # SIGVTALRM is from a rank that has printed an error which a restart would repeat
        return 1 if error.sigval == signal.SIGVTALRM else 128 + error.sigval
    except (DistError, RendezvousError) as error:
        cause = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        return (
            f"error: the hosts did not find each other ({cause}); expected: MASTER_ADDR is the "
            "first host, MASTER_PORT is free there, the same command runs on every host"
        )
    finally:
        for name in heard:  # one more changes nothing now
            signal.signal(signal.Signals[name], signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
