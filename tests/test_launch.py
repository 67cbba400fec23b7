"""torchrun's mends: pytest tests/test_launch.py. Several hosts are in test_two_hosts.py."""

import subprocess
import sys

from ranks import ROOT, environment

RANK = r"""
import os
import torch.distributed as dist
dist.init_process_group("gloo")
store = dist.distributed_c10d._get_default_store()
os.write(1, f"found {store.check(['left by a former round'])}\n".encode())  # in one piece
dist.barrier()
store.set("left by a former round", "")
os._exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""


def test_ranks_that_are_started_again_find_nothing_of_the_former_ones(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    flags = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "rank.py"]
    done = subprocess.run(
        [sys.executable, ROOT / "training" / "launch.py", *flags], cwd=tmp_path,
        env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == 4 * ["found False"]
