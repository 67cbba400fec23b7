"""One rank fails, and all end with its cause in the last line: pytest tests/test_ill_rank.py"""

import subprocess
import sys
import time

import pytest
from ranks import ROOT, environment


@pytest.mark.parametrize(
    "illness, last",
    [
        ("exception", "KeyError: 'a bug on one rank'"),
        ("nan", "error: the loss is no finite number at epoch 1, step 4; likely cause: "),
        ("memory", "error: out of memory; try a smaller --micro-batch-size"),
        ("hang", "error: another rank did not come to a collective within 10 s: it hangs, or "),
        ("killed", "error: rank 1 was killed by SIGKILL"),
    ],
)
def test_the_first_cause_is_shown_last(tiny_backbone, news_folder, tmp_path, illness, last):
    launch = [ROOT / "training" / "launch.py", "--standalone", "--nproc-per-node", 2]
    script = [ROOT / "tests" / "faults" / "ill_rank.py", "--model", tiny_backbone, "--data",
              news_folder, "--global-batch-size", 8, "--checkpoint-dir", tmp_path]
    env = environment(ILLNESS=illness, TIMEOUT="10", GLOO_SOCKET_IFNAME="lo")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *map(str, [*launch, *script])], cwd=tmp_path, env=env,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode not in (0, None)
    # the start, the time-out, and the 30 s that torchrun gives a rank which does not end
    assert time.monotonic() - began < 70
    assert last in done.stderr.strip().splitlines()[-1], done.stderr
    assert "another rank has gone" not in done.stderr
