"""How much of a training step is communication, and how many bytes the flags would save."""

import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from comm_hooks import EMBEDDING_WEIGHT
from errors import print0
from utils import all_reduce_sum


def timed_backward(model, batch, autocast, device, context) -> float:
    """Seconds of one forward and backward in `context`."""
    input_ids, attention_mask, labels = (tensor.to(device) for tensor in batch)
    all_reduce_sum([0.0])  # all ranks begin together
    t0 = time.perf_counter()
    with autocast, context:
        loss = F.cross_entropy(model(input_ids, attention_mask).float(), labels)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - t0


def report(
    model: DistributedDataParallel, batch, autocast, grad_accum_steps: int, args, scaler
) -> None:
    """Prints the share of communication in a step, and the flags that send fewer bytes.

    Times forward and backward of one micro-batch with its all-reduce and, under `no_sync`, without.
    Every rank calls it, rank 0 prints; no gradients are left.
    """
    device, both, compute = next(model.parameters()).device, [], []
    for _ in range(3):
        both.append(timed_backward(model, batch, autocast, device, nullcontext()))
        compute.append(timed_backward(model, batch, autocast, device, model.no_sync()))
    model.zero_grad()
    if dist.get_world_size() == 1:
        return
    both, compute = all_reduce_sum([min(both), min(compute)])  # sums: their ratio is the mean's
    share = max(0.0, both - compute) / (grad_accum_steps * compute + max(0.0, both - compute))
    sizes = {name: 4 * p.numel() / 1e6 for name, p in model.module.named_parameters()}
    less, flags = sum(sizes.values()) - sizes[EMBEDDING_WEIGHT], []
    sent = less + (0 if args.sparse_embeddings else sizes[EMBEDDING_WEIGHT])
    if args.grad_compression != "none":
        sent, less = sent / 2, less / 2
    if not args.sparse_embeddings:
        flags.append("--sparse-embeddings")
    if args.grad_compression == "none" and device.type == "cuda":  # over gloo converting costs more
        less /= 2
        # fp16 has no small numbers: without the scaler's factor small gradients would become 0
        flags.append(f"--grad-compression {'fp16' if scaler.is_enabled() else 'bf16'}")
    if share < 0.1:
        advice = "little is left to gain"
    elif flags:
        advice = f"{' '.join(flags)} would send about {less:.0f} MB instead of {sent:.0f}"
    else:
        advice = "a larger --global-batch-size needs fewer all-reduces per row"
    print0(f"communication: {share:.0%} of a step's forward and backward; {advice}")
