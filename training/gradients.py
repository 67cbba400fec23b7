"""What DDP sends of the gradients, where it is not to be all of them in fp32."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F

WORDS = "distilbert.embeddings.word_embeddings.weight"


def share_gradients(model, compression: str, sparse_embeddings: bool) -> None:
    """Has DDP call a function of ours for each full bucket, in the place of its own all-reduce.

    16-bit copies are half the bytes, and rounded. Sparse embeddings are exact: a batch touches a
    few thousand of the vocabulary's rows, all others have a gradient of zero, and are not sent.
    Pages: https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html
    """
    if compression == "none" and not sparse_embeddings:
        return
    if not sparse_embeddings and dist.get_backend() != "gloo":  # torch's own, which overlap more
        hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
        return model.register_comm_hook(None, hooks[compression])
    dtype = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[compression]
    words = model.module.get_parameter(WORDS) if sparse_embeddings else None

    def hook(state, bucket):
        if any(parameter is words for parameter in bucket.parameters()):
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                (average_rows if parameter is words else average)(gradient, dtype)
        else:
            average(bucket.buffer(), dtype)
        # waited for, so that no Python callback is left to gloo's threads
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, hook)


def average(gradient: Tensor, dtype: torch.dtype) -> None:
    """The mean over ranks, in place; sent as `dtype`, and divided before the sum can overflow."""
    sent = gradient.to(dtype).div_(dist.get_world_size())
    dist.all_reduce(sent)
    if sent is not gradient:
        gradient.copy_(sent)


def average_rows(gradient: Tensor, dtype: torch.dtype) -> None:
    """The same for a matrix most of whose rows are zero: only the others are gathered, and added.

    All ranks add in the order of ranks, so that all get the same bits.
    """
    world_size = dist.get_world_size()
    touched = gradient.any(1).nonzero().squeeze(1)
    most = torch.tensor(len(touched))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    missing = int(most) - len(touched)  # a gather wants equal shapes: zeros, added to row 0
    numbers = F.pad(touched, (0, missing))
    rows = F.pad((gradient[touched] / world_size).to(dtype), (0, 0, 0, missing))
    all_numbers = [torch.empty_like(numbers) for _ in range(world_size)]
    all_rows = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(all_numbers, numbers)
    dist.all_gather(all_rows, rows)
    gradient[touched] = 0
    for theirs, their_rows in zip(all_numbers, all_rows, strict=True):
        gradient.index_add_(0, theirs, their_rows.to(gradient.dtype))
