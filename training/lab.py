"""Break DDP yourself: one broken variant beside the right one, on two CPU processes, in seconds.

python training/lab.py              # lists the experiments
python training/lab.py no-set-epoch

Each imports the real code and changes one thing. A small model on made-up rows, so that nothing is
downloaded; what breaks is the same at any size.
"""

import os
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, RandomSampler

import utils
from dataset import LengthWindows, TokenizedNews, eval_loader, train_loader
from model import Config, NewsClassifier

ROWS, BATCH = 400, 16
CONFIG = Config(vocab_size=500, dim=64, n_layers=2, n_heads=4, hidden_dim=128)


def make_rows(count: int) -> TokenizedNews:
    """Rows of 5 to 30 tokens; a row's label is that of the word family that half of them are of."""
    rng = np.random.default_rng(0)
    lengths, labels = rng.integers(5, 31, count), rng.integers(0, 4, count)
    ids = rng.integers(0, 500, lengths.sum())
    family = np.repeat(labels, lengths) * 125 + rng.integers(0, 125, len(ids))
    ids = np.where(rng.random(len(ids)) < 0.5, family, ids)
    return TokenizedNews(ids, np.cumsum(lengths), labels, np.arange(count))


class Lab:
    """A rank with the model, its DDP wrapper and the rows, all as in train_ddp.py."""

    def __init__(self, rank: int, dropout: float = 0.0):
        self.rank, self.data = rank, make_rows(ROWS)
        torch.manual_seed(0)
        config = Config(**{**CONFIG.__dict__, "dropout": dropout, "attention_dropout": dropout,
                           "seq_classif_dropout": dropout})  # fmt: skip
        self.raw_model = NewsClassifier(config)
        self.model = DistributedDataParallel(self.raw_model, gradient_as_bucket_view=True)
        self.optimizer = utils.make_optimizer(self.raw_model, 1e-3)
        self.sampler = DistributedSampler(self.data, 2, rank, seed=0)

    def steps(self, sampler=None, micro=BATCH // 2):
        windows = LengthWindows(sampler or self.sampler, self.data.lengths, BATCH)
        return train_loader(self.data, windows, micro)

    def loss(self, batch, model=None):
        input_ids, attention_mask, labels = batch
        logits = (model or self.model)(input_ids, attention_mask)
        return F.cross_entropy(logits, labels, reduction="sum")

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.raw_model.parameters()])

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.raw_model.parameters()])


def both(value) -> list:
    """The value of rank 0 and of rank 1."""
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


# The experiments: each takes (rank, broken) and returns {what: number, or a list to be drawn}


def no_set_epoch(rank: int, broken: bool) -> dict:
    """DDP 3/7. Without sampler.set_epoch every epoch has the first one's order."""
    lab, orders = Lab(rank), []
    for epoch in range(4):
        if not broken:
            lab.sampler.set_epoch(epoch)
        orders.append(list(lab.sampler))
    same = [np.mean(np.array(order) == orders[0]) for order in orders]
    return {"rows in the place they had in epoch 1, by epoch": [100 * s for s in same]}


def no_sampler(rank: int, broken: bool) -> dict:
    """DDP 3/7. Without DistributedSampler both ranks train on the same rows."""
    lab = Lab(rank)
    generator = torch.Generator().manual_seed(0)
    sampler = RandomSampler(lab.data, generator=generator) if broken else lab.sampler
    mine, theirs = both(list(sampler))
    return {"rows that an epoch costs": len(mine) + len(theirs),
            "rows that both ranks see": len({*mine} & {*theirs})}  # fmt: skip


def wrong_rank_saves(rank: int, broken: bool) -> dict:
    """DDP 7/7. Where every rank writes the same file, in its place, readers find ruins."""
    lab, bad = Lab(rank), 0
    path = Path(both(tempfile.mkdtemp() if rank == 0 else None)[0]) / "model.pt"
    for _ in range(30):
        if broken:
            torch.save(lab.raw_model.state_dict(), path)
        elif rank == 0:
            utils.save_checkpoint({"model": lab.raw_model.state_dict()}, path)
        try:
            bad += not torch.load(path)
        except Exception:  # half of one file and half of another fail in many ways
            bad += path.exists()
    return {"of 60 reads, those that failed": sum(both(bad))}


def padded_evaluation(rank: int, broken: bool) -> dict:
    """DDP 6/7. DistributedSampler repeats rows until the ranks have equally many: right for
    training, wrong for counting."""
    split = make_rows(31)
    if broken:
        sampler = DistributedSampler(split, 2, rank, shuffle=False)
        loader = torch.utils.data.DataLoader(split, 8, sampler=sampler, collate_fn=lambda x: x)
        mine = sum(len(batch) for batch in loader)
    else:
        mine = sum(len(labels) for _, _, labels in eval_loader(split, 8, rank, 2))
    return {"rows counted, of 31": sum(both(mine))}


def no_averaging(rank: int, broken: bool) -> dict:
    """DDP 4/7. Without the wrapper each rank follows its own gradients, and the models part."""
    lab, apart = Lab(rank), []
    for micro_batches in lab.steps():
        model = lab.raw_model if broken else lab.model
        (lab.loss(micro_batches[0], model) / (BATCH // 2)).backward()
        lab.optimizer.step()
        lab.optimizer.zero_grad()
        zero, one = both(lab.weights())
        apart.append(float((zero - one).norm()))
    return {"distance between the ranks' weights, by step": apart}


def equal_seeds(rank: int, broken: bool) -> dict:
    """With the same seed on all ranks, dropout drops the same units on all of them."""
    lab = Lab(rank, dropout=0.5)
    utils.seed_step(0, 0, 0, 0 if broken else rank)
    kept = lab.raw_model.dropout(torch.ones(10_000)) > 0
    zero, one = both(kept)
    return {"units that both ranks treat alike, %": 100 * float((zero == one).float().mean())}


def collective_in_if(rank: int, broken: bool) -> dict:
    """DDP 6/7. A collective that only rank 0 calls waits for the others until it times out."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    total, began = torch.ones(1), time.perf_counter()
    try:
        if rank == 0 or not broken:
            dist.all_reduce(total, group=group)
        happened = f"a sum of {float(total):g}"
    except RuntimeError as error:
        happened = str(error).split("] ")[-1].splitlines()[0][:60]
    return {"what rank 0 got": happened, "after seconds": time.perf_counter() - began}


def no_sync_forgotten(rank: int, broken: bool) -> dict:
    """DDP 5/7. Without no_sync every micro-batch pays for an all-reduce; one would have done."""
    lab, sent = Lab(rank), 0

    def hook(state, bucket):
        nonlocal sent
        sent += bucket.buffer().nbytes
        dist.all_reduce(bucket.buffer())
        done = torch.futures.Future()
        done.set_result(bucket.buffer().div_(2))
        return done

    lab.model.register_comm_hook(None, hook)
    micro_batches = next(iter(lab.steps(micro=2)))
    for number, batch in enumerate(micro_batches, 1):
        last = number == len(micro_batches)
        with nullcontext() if last or broken else lab.model.no_sync():
            (lab.loss(batch) * 2 / BATCH).backward()
    return {"KiB sent for one step of 4 micro-batches": sent / 1024,
            "norm of the gradient": float(lab.gradient().norm())}  # fmt: skip


def undivided_accumulation(rank: int, broken: bool) -> dict:
    """DDP 5/7. Gradients add up over micro-batches: divide each loss by the whole step's rows."""
    norms = []
    for micro in (8, 4, 2, 1):
        lab = Lab(rank)
        micro_batches = next(iter(lab.steps(micro=micro)))
        for number, batch in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            with nullcontext() if last else lab.model.no_sync():
                part = len(batch[2]) * 2 if broken else BATCH
                (lab.loss(batch) * 2 / part).backward()
        norms.append(float(lab.gradient().norm()))
    return {"norm of the gradient with 1, 2, 4, 8 micro-batches": norms}


EXPERIMENTS = {
    function.__name__.replace("_", "-"): function
    for function in (no_set_epoch, no_sampler, wrong_rank_saves, padded_evaluation, no_averaging,
                     equal_seeds, collective_in_if, no_sync_forgotten, undivided_accumulation)
}  # fmt: skip


def draw(values: list[float]) -> str:
    """Bars from nothing to the largest value."""
    top = max(*values, 1e-12)
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * value / top)] for value in values)


def show(value) -> str:
    if isinstance(value, list):
        ends = value if len(value) <= 8 else [value[0], value[-1]]
        between = ", " if ends is value else " to "
        return f"[{draw(value)}] {between.join(f'{v:.3g}' for v in ends)}"
    return f"{value:.4g}" if isinstance(value, float | int) else value


def worker(rank: int, names: list[str], place: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{place}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name in names:
        experiment = EXPERIMENTS[name]
        utils.print0(f"{name}: {' '.join(experiment.__doc__.split())}")
        for broken in (False, True):
            found = experiment(rank, broken)
            for what, value in found.items():
                utils.print0(f"    {'broken' if broken else 'right '}  {what}: {show(value)}")
    utils.settle()
    os._exit(0)


def main() -> None:
    names = sys.argv[1:]
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        sys.exit(f"error: no experiment {unknown[0]}; without a name all are listed")
    if not names:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:24}{' '.join(experiment.__doc__.split())}")
        return
    with tempfile.TemporaryDirectory() as place:
        mp.spawn(worker, (names, place), nprocs=2)


if __name__ == "__main__":
    main()
