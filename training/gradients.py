"""What DDP sends of the gradients, where it is not to be all of them in fp32."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

WORDS = "distilbert.embeddings.word_embeddings.weight"


def keep_words_out(raw_model, sparse_embeddings: bool) -> None:
    """Before the wrapper: has DDP leave the word embeddings' gradient to `share_gradients`."""
    if sparse_embeddings:
        # the only way to ask, though its name is private; what is left out is not copied either
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(raw_model, [WORDS])
        dist.broadcast(raw_model.get_parameter(WORDS).data, 0)


def share_gradients(model, compression: str, sparse_embeddings: bool) -> None:
    """Sends 16-bit copies of DDP's buckets, half the bytes, and rounded; and of the word embeddings
    only the rows that a batch touched. All others have a gradient of zero, so that is exact.
    """
    dtype = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[compression]
    if sparse_embeddings:
        # backward comes to the embeddings last: all buckets are on their way by then

        def exchange(words):
            if model.require_backward_grad_sync:  # not under no_sync
                average_rows(words.grad, dtype)

        model.module.get_parameter(WORDS).register_post_accumulate_grad_hook(exchange)
    if compression == "none":
        return
    if dist.get_backend() != "gloo":
        hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
        return model.register_comm_hook(None, hooks[compression])

    def hook(state, bucket):
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
