"""train_ddp.py, of which rank 1 falls ill in its third step, by ILLNESS.

torchrun starts it in the place of train_ddp.py; see tests/test_ill_rank.py.
"""

import os
import runpy
import signal
import time
from pathlib import Path

import torch
from torch import nn

TRAINING = Path(__file__).parents[2] / "training"
clip, steps = nn.utils.clip_grad_norm_, 0


def fall_ill(parameters, limit):
    global steps
    parameters, steps = list(parameters), steps + 1
    if steps == 3 and os.environ["RANK"] == "1":
        illness = os.environ["ILLNESS"]
        if illness == "exception":
            raise KeyError("a bug on one rank")
        if illness == "nan":
            parameters[0].data.fill_(float("nan"))
        if illness == "memory":
            torch.empty(10**15)
        if illness == "hang":
            time.sleep(1000)
        if illness == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return clip(parameters, limit)


nn.utils.clip_grad_norm_ = fall_ill
runpy.run_path(str(TRAINING / "train_ddp.py"), run_name="__main__")
