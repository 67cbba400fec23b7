"""One rank fails, and all end with its cause in the last line: pytest tests/test_faulty_rank.py"""

import subprocess
import sys
import time

import pytest
from ranks import ROOT, environment


@pytest.mark.parametrize(
    "fault, last",
    [
        ("exception", "KeyError: 'a bug on one rank'"),
        ("nan", "error: grad_norm is nan at step 3; use a lower --lr"),
        ("memory", "error: out of memory; use a smaller --micro-batch-size"),
        ("hang", "error: another rank did not reach a collective within 10 s: it hangs, or "),
        ("killed", "error: rank 1 was killed by SIGKILL"),
    ],
)
def test_the_first_cause_is_shown_last(tiny_backbone, news_folder, tmp_path, fault, last):
    launch = [ROOT / "training" / "torchrun.py", "--standalone", "--nproc-per-node", 2]
    script = [ROOT / "tests" / "instrument.py", tmp_path, ROOT / "training" / "train_ddp.py"]
    flags = ["--model", tiny_backbone, "--data", news_folder, "--global-batch-size", 8]
    flags += ["--checkpoint-dir", tmp_path / "c"]
    env = environment(FAULT=fault, TIMEOUT="10", GLOO_SOCKET_IFNAME="lo")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *map(str, [*launch, *script, *flags])], cwd=tmp_path, env=env,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode not in (0, None)
    # the start, the time-out, and the 30 s that torchrun gives a rank which does not end
    assert time.monotonic() - began < 70
    assert last in done.stderr.strip().splitlines()[-1], done.stderr
    assert "another process exited" not in done.stderr
    assert done.stderr.count("error: ") <= 1
