"""A rank that all-reduces 64 MiB a few times; rank 0 prints how long it took. run.py starts it."""

import json
import os
import signal
import time
from statistics import median

import torch
import torch.distributed as dist

signal.alarm(80)  # ends a rank that hangs: torchrun may be gone, and the card would stay taken
cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
gradients, times = torch.ones(16 * 2**20, device=device), []
for _ in range(6):
    began = time.perf_counter()
    dist.all_reduce(gradients)
    total = float(gradients[0])  # waits for it
    times.append(time.perf_counter() - began)
assert total == dist.get_world_size() ** 6, f"all-reduce gave {total}"
if dist.get_rank() == 0:
    seconds = median(times[1:])
    print(json.dumps({"seconds": seconds, "gb_per_second": gradients.nbytes / seconds / 1e9}))
dist.barrier()
dist.destroy_process_group()
