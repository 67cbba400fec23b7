"""A DDP communication hook: sends fewer bytes of the gradients than DDP does by itself.

DDP gathers gradients in buckets (flat fp32 buffers, about 25 MiB each) and averages every full
bucket over the ranks, once per step. A communication hook replaces that averaging: DDP hands it the
local bucket and takes back a future of the averaged one. Of DistilBERT-base's 268 MB per step

- compression sends 16-bit copies: half the bytes. Values and their sums are rounded, to 11
  significant bits in fp16 and 8 in bf16. But fp16 rounds more coarsely below 6e-5, and to 0 below
  3e-8: take it with the GradScaler of --precision fp16, else bf16;
- sparse embeddings sends only the touched rows of the word embeddings (30,522 x 768 x 4 bytes =
  93.8 MB): those of the tokens that occur, about 2,300 in 128 texts. All others are zero, so
  nothing is lost. It sends fewer bytes while a rank touches fewer than 2 / world_size of all rows.
  Over gloo steps became no faster for it: nothing overlaps then.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

EMBEDDING_WEIGHT = "distilbert.embeddings.word_embeddings.weight"
DTYPES = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def register_comm_hook(
    model: DistributedDataParallel, compression: str = "none", sparse_embeddings: bool = False
) -> None:
    """Sends gradients as 16-bit copies ("fp16", "bf16"), and word embeddings by touched rows.

    Call it once, before training. With neither option DDP's own all-reduce stays.
    """
    if compression == "none" and not sparse_embeddings:
        return
    dtype = DTYPES[compression]
    embedding = model.module.get_parameter(EMBEDDING_WEIGHT) if sparse_embeddings else None

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        # Divided before the sum: an undivided sum would overflow fp16 sooner. An overflow gives inf
        # or NaN on all ranks alike, so that GradScaler skips the step on all of them.
        buffer = bucket.buffer().div_(dist.get_world_size())
        dense = [buffer]
        # looked up in every step: DDP builds its buckets anew after the first backward
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if parameter is embedding:
                all_reduce_rows(gradient, dtype)
                start = gradient.storage_offset() - buffer.storage_offset()
                dense = [buffer[:start], buffer[start + gradient.numel() :]]

        if len(dense) == 1 and buffer.is_cuda and "nccl" in dist.get_backend():
            # not waited for: backward computes the next bucket while this one is sent
            future = dist.all_reduce(buffer.to(dtype), async_op=True).get_future()
            return future.then(lambda sent: buffer.copy_(sent.value()[0]))
        # Waited for: over gloo, because a Python callback that its own thread runs can race with
        # the interpreter's shutdown; over NCCL, because the embeddings come last in any case.
        for part in dense:
            if part.numel():
                sent = part.to(dtype)
                dist.all_reduce(sent)
                part.copy_(sent)
        averaged = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        averaged.set_result(buffer)
        return averaged

    model.register_comm_hook(None, hook)


def all_reduce_rows(gradient: Tensor, dtype: torch.dtype) -> None:
    """Sums a (rows, dim) gradient over ranks, in place; only rows that are not zero are sent."""
    touched = gradient.any(1)  # NaN counts as not zero
    count = touched.sum()
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    count = int(count)  # a shape is needed on the host: here, and only here, it waits for the GPU
    if count == 0:
        return
    # All ranks must send equally many rows: those with fewer add untouched ones, which are zero.
    rows = touched.byte().argsort(descending=True)[:count]
    values = gradient[rows].to(dtype)
    all_rows = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    all_values = [torch.empty_like(values) for _ in all_rows]
    dist.all_gather(all_rows, rows)
    dist.all_gather(all_values, values)
    gradient[rows] = 0
    # Added rank by rank, where no row occurs twice: one order, so bit-identical on all ranks.
    for rank_rows, rank_values in zip(all_rows, all_values, strict=True):
        gradient.index_add_(0, rank_rows, rank_values.to(gradient.dtype))
