"""torchrun that ends quietly and starts again cleanly; run_ddp.sh gives it torchrun's arguments.

torchrun is `torch.distributed.run.main()`. When a rank fails it buries what the rank said under a
traceback of its own and exits with 1. Here the rank's words stay last, and its status is passed on.
What keeps hosts from meeting is said in one line.
"""

import logging
import os
import signal
import socket
import sys
from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import main


class ImpatientStore(TCPStore):
    """The hosts' common store, whose calls end when the other side has been silent for `timeout`.

    A call that times out says so to the store, and waits for its reply without any limit: for a
    quarter of an hour, behind a cut wire. So the kernel is asked to give the connection up.
    """

    def __init__(self, *args, timeout: timedelta, **kwargs):
        super().__init__(*args, timeout=timeout, **kwargs)
        milliseconds = 1000 * int(timeout.total_seconds())
        for number in os.listdir("/proc/self/fd") if sys.platform == "linux" else []:
            try:
                borrowed = socket.socket(fileno=int(number))
            except OSError:
                continue  # a file or a pipe
            if borrowed.family in (socket.AF_INET, socket.AF_INET6):
                borrowed.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            borrowed.detach()  # the store's own, so not to be closed


join = DynamicRendezvousHandler.next_rendezvous


def join_anew(handler):
    """Gives the ranks of every round a store of their own.

    torchrun keeps that of the first round. There a rank that is started again can read where the
    others listened before they died, and all wait for each other.
    """
    handler._shared_tcp_store_server = handler._bootstrap_store_info = None
    return join(handler)


def launch() -> int:
    c10d_rendezvous_backend.TCPStore = ImpatientStore
    DynamicRendezvousHandler.next_rendezvous = join_anew
    logging.disable(logging.ERROR)  # in this process alone; the ranks log as they like
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"error: rank {rank} was killed by {name}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        print(f"error: the hosts' common store does not answer ({cause}); is MASTER_ADDR the first "
              "host's address, MASTER_PORT free there, its launcher running, the network whole?",
              file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    os.environ["LAUNCHER_PID"] = str(os.getpid())  # see utils.end_with_launcher
    # a rank finishes its step and saves before it obeys a signal; torchrun would kill it after 30 s
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    sys.exit(launch())
