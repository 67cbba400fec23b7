"""The communication hook in real processes on gloo, beside DDP's own all-reduce."""

import itertools
import math
import os
import sys
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from comm_hooks import EMBEDDING_WEIGHT, register_comm_hook
from model import Config, NewsClassifier

CONFIG = Config(500, 64, 32, 2, 4, 64, dropout=0, attention_dropout=0, seq_classif_dropout=0)
PARAMETERS = sum(p.numel() for p in NewsClassifier(CONFIG).parameters())
ITEM_SIZE = {"none": 4, "fp16": 2, "bf16": 2}
STEPS = 4  # DDP builds its buckets anew after the first
WORLD_SIZE = 3


class Case(NamedTuple):
    compression: str
    sparse: bool
    grad_accum_steps: int = 1
    bucket_mb: float = 0.02  # several buckets; with 25 one holds everything
    bad: float = 0  # added to two gradient values of the last rank in step 2


PLAIN = {1: Case("none", False, 1), 3: Case("none", False, 3)}  # by grad_accum_steps
EXACT = [Case("none", True), Case("none", True, 3), Case("none", True, 1, 25)]
ROUNDED = [
    *itertools.starmap(Case, itertools.product(["fp16", "bf16"], [False, True], [1, 3])),
    Case("bf16", True, 1, 25),
]
BAD = [
    *(Case("none", True, bad=bad) for bad in (math.inf, math.nan)),
    *(Case("fp16", sparse, bad=1e6) for sparse in (False, True)),  # finite in fp32, not in fp16
]


def make_input_ids(step: int, micro_step: int, rank: int) -> torch.Tensor:
    """(4, 16) token ids, of more different tokens on higher ranks."""
    rng = torch.Generator().manual_seed(100 * step + 10 * micro_step + rank)
    return torch.randint(1, 20 * (rank + 1), (4, 16), generator=rng)


def is_idle(step: int, rank: int) -> bool:
    """Whether all gradients of this rank are zero."""
    return step == 3 or (step == 2 and rank == 0)


def count_touched_rows(step: int, rank: int, grad_accum_steps: int) -> int:
    if step == 1 and rank == 0:
        return CONFIG.vocab_size
    ids = [make_input_ids(step, micro_step, rank) for micro_step in range(grad_accum_steps)]
    return 0 if is_idle(step, rank) else len(torch.stack(ids).unique())


def count_bytes(sent: dict) -> None:
    """Has `sent` count the bytes that this process hands to each collective."""

    def instrument(name, position):
        collective = getattr(dist, name)

        def counted(*args, **kwargs):
            sent[name] += args[position].nbytes
            return collective(*args, **kwargs)

        setattr(dist, name, counted)

    instrument("all_reduce", 0)
    instrument("all_gather", 1)


def train(case: Case, rank: int, sent: dict) -> tuple[list, list]:
    """All gradients and the bytes sent, step by step."""
    torch.manual_seed(0)
    model = DistributedDataParallel(
        NewsClassifier(CONFIG), gradient_as_bucket_view=True, bucket_cap_mb=case.bucket_mb
    )
    register_comm_hook(model, case.compression, case.sparse)
    words = model.module.get_parameter(EMBEDDING_WEIGHT)
    gradients, sent_by_step = [], []
    for step in range(STEPS):
        sent.update(all_reduce=0, all_gather=0)
        for micro_step in range(case.grad_accum_steps):
            last = micro_step == case.grad_accum_steps - 1
            with nullcontext() if last else model.no_sync():
                logits = model(make_input_ids(step, micro_step, rank), torch.ones(4, 16))
                loss = F.cross_entropy(logits, torch.arange(4)) * (not is_idle(step, rank))
                if step == 1 and rank == 0:
                    loss = loss + 1e-3 * words.sum()  # touches all rows
                if step == 2 and rank == WORLD_SIZE - 1 and case.bad:
                    # the row of a token that does not occur
                    loss = loss + case.bad * (words[499, 3] + model.module.classifier.bias[0])
                loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        sent_by_step.append(dict(sent))
        model.zero_grad()
    return gradients, sent_by_step


def run_rank(rank: int, folder) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    sent = {}
    count_bytes(sent)
    cases = [*PLAIN.values(), *EXACT, *ROUNDED, *BAD]
    results = {tuple(case): train(case, rank, sent) for case in cases}
    torch.save(list(results.items()), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """For each rank what `train` returned, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    # from the fork server of ranks.py, which has imported torch
    start_processes(run_rank, [folder], WORLD_SIZE, start_method="forkserver")
    files = [folder / f"rank{rank}.pt" for rank in range(WORLD_SIZE)]
    return [{repr(Case(*case)): seen for case, seen in torch.load(file)} for file in files]


def gradients_of(ranks: list, case: Case) -> list[torch.Tensor]:
    """The gradients of each step, after a check that all ranks hold the same bits."""
    first, *others = (rank[repr(case)][0] for rank in ranks)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
    return first


@pytest.mark.parametrize("case", [*EXACT, *ROUNDED], ids=repr)
def test_gradients_are_those_of_plain_ddp_on_all_ranks(ranks, case):
    tolerance = 1e-6 if case.compression == "none" else 1e-2
    expected = gradients_of(ranks, PLAIN[case.grad_accum_steps])
    for found, plain in zip(gradients_of(ranks, case), expected, strict=True):
        assert (found - plain).norm() <= tolerance * plain.norm()
        untouched = plain == 0
        assert torch.equal(found[untouched], plain[untouched])


@pytest.mark.parametrize("case", [*PLAIN.values(), *EXACT, *ROUNDED], ids=repr)
def test_each_step_sends_every_dense_gradient_once_and_only_touched_rows(ranks, case):
    size = ITEM_SIZE[case.compression]
    for rank in ranks:
        for step, sent in enumerate(rank[repr(case)][1]):
            if case in PLAIN.values():
                expected = {"all_reduce": 0, "all_gather": 0}  # DDP's own does not pass here
            elif case.sparse:
                most = max(
                    count_touched_rows(step, r, case.grad_accum_steps) for r in range(len(ranks))
                )
                dense = PARAMETERS - CONFIG.vocab_size * CONFIG.dim
                row = 8 + CONFIG.dim * size  # its number and its values
                expected = {"all_reduce": dense * size + 8, "all_gather": most * row}
            else:
                expected = {"all_reduce": PARAMETERS * size, "all_gather": 0}
            assert sent == expected


@pytest.mark.parametrize("case", BAD, ids=repr)
def test_a_gradient_that_is_not_finite_on_one_rank_is_so_on_all(ranks, case):
    *before, bad, after = gradients_of(ranks, case)
    expected = torch.full([2], case.bad if case.compression == "none" else math.inf)
    torch.testing.assert_close(bad[~bad.isfinite()], expected, equal_nan=True)
    assert all(gradient.isfinite().all() for gradient in [*before, after])
