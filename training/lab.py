"""Break DDP yourself: one broken variant beside the right one, on two CPU processes, in seconds.

python training/lab.py              # lists the experiments, and offers the tour
python training/lab.py no-set-epoch
python training/lab.py tour         # all of them, in the order of the marks in train_ddp.py

Each changes one thing around the repo's own functions, and prints it as a two-line diff. A small
model on made-up rows, so that nothing is downloaded; what breaks is the same at any size.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all processes without a traceback

import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import checkpoint
import machine
import utils
from dataset import LengthGroupedSampler, TokenizedExamples, collate, eval_loader
from errors import one_line_errors, print0, repair_output
from model import Config, NewsClassifier

ROWS, BATCH = 400, 16
CONFIG = Config(vocab_size=500, dim=64, n_layers=2, n_heads=4, hidden_dim=128)


def make_rows(count: int) -> TokenizedExamples:
    """Rows of 5 to 30 tokens; half of them are words of the row's class, the others any."""
    rng = np.random.default_rng(0)
    lengths, labels = rng.integers(5, 31, count), rng.integers(0, 4, count)
    ids = rng.integers(0, 500, lengths.sum())
    family = np.repeat(labels, lengths) * 125 + rng.integers(0, 125, len(ids))
    ids = np.where(rng.random(len(ids)) < 0.5, family, ids)
    return TokenizedExamples(ids, np.cumsum(lengths), labels, np.arange(count))


class Lab:
    """A rank with the model, its DDP wrapper and the rows, all as in train_ddp.py."""

    def __init__(self, rank: int, dropout: float = 0.0, num_replicas: int = 2):
        self.rank, self.data = rank, make_rows(ROWS)
        torch.manual_seed(0)
        names = ("dropout", "attention_dropout", "seq_classif_dropout")
        config = Config(**(CONFIG.__dict__ | dict.fromkeys(names, dropout)))
        self.raw_model = NewsClassifier(config)
        self.model = DistributedDataParallel(self.raw_model, gradient_as_bucket_view=True)
        self.optimizer = utils.make_optimizer(self.raw_model, 1e-3)
        rank = rank if num_replicas == 2 else 0
        self.sampler = LengthGroupedSampler(self.data, BATCH, num_replicas=num_replicas, rank=rank)

    def batches(self, micro_batch_size: int = BATCH // 2):
        loader = DataLoader(self.data, micro_batch_size, sampler=self.sampler, collate_fn=collate)
        return iter(loader)

    def loss(self, batch, model=None):
        input_ids, attention_mask, labels = batch
        logits = (model or self.model)(input_ids, attention_mask)
        return F.cross_entropy(logits, labels)

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.raw_model.parameters()])


def both(value) -> list:
    """The value of rank 0 and of rank 1."""
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


# The experiments: each takes (rank, broken) and returns {what: number, or a list to be drawn}


def no_set_epoch(rank: int, broken: bool) -> dict:
    """DDP 3/7. Without set_epoch every epoch has the first one's order."""
    lab, orders = Lab(rank), []
    for epoch in range(4):
        if not broken:
            lab.sampler.set_epoch(epoch)
        orders.append(list(lab.sampler))
    same = [np.mean(np.array(order) == orders[0]) for order in orders]
    return {"rows in the place they had in epoch 1, by epoch, %": [100 * s for s in same]}


def no_sampler(rank: int, broken: bool) -> dict:
    """DDP 3/7. Without a share of its own every rank trains on the same rows."""
    lab = Lab(rank, num_replicas=1 if broken else 2)
    mine, theirs = both(list(lab.sampler))
    return {
        "rows that an epoch computes": len(mine) + len(theirs),
        "rows that both ranks see": len({*mine} & {*theirs}),
    }


def not_atomic(rank: int, broken: bool) -> dict:
    """DDP 7/7. A file that is written in its place can be read half-written, also with one writer.

    save_checkpoint writes a temporary file and renames it.
    """
    state = {"weights": torch.zeros(2_000_000)}
    folder = Path(both(tempfile.mkdtemp() if rank == 0 else None)[0])
    path, done, failed = folder / "model.pt", folder / "done", 0
    if rank == 0:
        for _ in range(30):
            torch.save(state, path) if broken else checkpoint.save_checkpoint(state, path)
        done.touch()
    while rank == 1 and not done.exists():
        try:
            torch.load(path)
        except FileNotFoundError:
            pass  # not written yet
        except Exception:  # half a file fails in many ways
            failed += 1
    failed = sum(both(failed))
    shutil.rmtree(folder, ignore_errors=True)
    return {"reads that failed while rank 0 wrote 30 times": failed}


def padded_evaluation(rank: int, broken: bool) -> dict:
    """DDP 6/7. DistributedSampler repeats rows until all shares are equal: wrong for counting."""
    split = make_rows(31)
    loader = eval_loader(split, 8, rank, 2)
    if broken:
        sampler = DistributedSampler(split, 2, rank, shuffle=False)
        loader = DataLoader(split, 8, sampler=sampler, collate_fn=collate)
    return {"rows counted, of 31": sum(both(sum(len(labels) for _, _, labels in loader)))}


def no_averaging(rank: int, broken: bool) -> dict:
    """DDP 4/7. Without the wrapper each rank follows its own gradients, and the models diverge."""
    lab, distances = Lab(rank), []
    for batch in lab.batches():
        lab.loss(batch, lab.raw_model if broken else lab.model).backward()
        lab.optimizer.step()
        lab.optimizer.zero_grad()
        zero, one = both(nn.utils.parameters_to_vector(lab.raw_model.parameters()).detach())
        distances.append(float((zero - one).norm()))
    return {"distance between the ranks' weights, by step": distances}


def equal_seeds(rank: int, broken: bool) -> dict:
    """With the same seed on all ranks, dropout drops the same units on all of them."""
    lab = Lab(rank, dropout=0.5)
    utils.seed_step(0, 0, 0 if broken else rank)
    kept = lab.raw_model.dropout(torch.ones(10_000)) > 0
    zero, one = both(kept)
    return {"units that both ranks treat alike, %": 100 * float((zero == one).float().mean())}


def collective_in_if(rank: int, broken: bool) -> dict:
    """DDP 6/7. A collective that only rank 0 calls waits for the others until it times out."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    total, t0 = torch.ones(1), time.perf_counter()
    try:
        if rank == 0 or not broken:
            dist.all_reduce(total, group=group)
        happened = f"a sum of {float(total):g}"
    except RuntimeError as error:
        happened = str(error).split("] ")[-1].splitlines()[0][:60]
    return {"what rank 0 got": happened, "after seconds": time.perf_counter() - t0}


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
    batches = lab.batches(micro_batch_size=2)
    for micro_step in range(4):
        last = micro_step == 3
        with nullcontext() if last or broken else lab.model.no_sync():
            (lab.loss(next(batches)) / 4).backward()
    return {
        "KiB sent for one step of 4 micro-batches": sent / 1024,
        "norm of the gradient": float(lab.gradient().norm()),
    }


def undivided_accumulation(rank: int, broken: bool) -> dict:
    """DDP 5/7. Gradients add up over micro-batches: divide each loss by their number."""
    norms = []
    for grad_accum_steps in (1, 2, 4, 8):
        lab = Lab(rank)
        batches = lab.batches(BATCH // 2 // grad_accum_steps)
        for micro_step in range(grad_accum_steps):
            last = micro_step == grad_accum_steps - 1
            with nullcontext() if last else lab.model.no_sync():
                loss = lab.loss(next(batches))
                (loss if broken else loss / grad_accum_steps).backward()
        norms.append(float(lab.gradient().norm()))
    return {"norm of the gradient with 1, 2, 4, 8 micro-batches": norms}


def unused_parameters(rank: int, broken: bool) -> dict:
    """DDP 4/7. DDP waits for every parameter's gradient; one that backward leaves out never comes.

    find_unused_parameters searches the graph after every forward, which costs time.
    """
    layer, steps = nn.Linear(8, 1), 0
    layer.unused = nn.Parameter(torch.ones(8))  # the forward leaves it out, as one of two heads
    model = DistributedDataParallel(layer, find_unused_parameters=not broken)
    try:
        while steps < 3:
            model(torch.ones(2, 8)).sum().backward()
            steps += 1
        happened = "none"
    except RuntimeError as error:
        happened = str(error).split(". ")[0]
    return {"steps done, of 3": steps, "error": happened}


def no_buffer_broadcast(rank: int, broken: bool) -> dict:
    """DDP 4/7. Gradients are averaged, buffers are not: DDP sends rank 0's before a forward.

    So BatchNorm's running mean holds rank 0's rows alone; SyncBatchNorm averages over all ranks.
    """
    norm = nn.BatchNorm1d(8)
    warnings.simplefilter("ignore", FutureWarning)  # newer releases: forward_sync_buffers
    model = DistributedDataParallel(norm, broadcast_buffers=not broken)
    torch.manual_seed(rank)
    for _ in range(20):
        model(torch.randn(4, 8)).sum().backward()
    model.eval()
    model(torch.zeros(1, 8))
    zero, one = both(norm.running_mean)
    return {"distance between the ranks' running means": float((zero - one).norm())}


# experiment, the right line, the broken line; in the order of the marks
EXPERIMENTS = {
    function.__name__.replace("_", "-"): (function, right, broken)
    for function, right, broken in (
        (no_sampler, "num_replicas=world_size, rank=rank", "num_replicas=1, rank=0"),
        (no_set_epoch, "sampler.set_epoch(epoch)", "pass"),
        (no_averaging, "model = DistributedDataParallel(raw_model)", "model = raw_model"),
        (unused_parameters, "find_unused_parameters=True", "find_unused_parameters=False"),
        (no_buffer_broadcast, "broadcast_buffers=True", "broadcast_buffers=False"),
        (no_sync_forgotten, "nullcontext() if last else model.no_sync()", "nullcontext()"),
        (undivided_accumulation, "(loss / grad_accum_steps).backward()", "loss.backward()"),
        (equal_seeds, "utils.seed_step(seed, step, rank)", "utils.seed_step(seed, step, 0)"),
        (padded_evaluation, "eval_loader(...)", "DataLoader(..., sampler=DistributedSampler(...))"),
        (collective_in_if, "dist.all_reduce(total)", "if rank == 0: dist.all_reduce(total)"),
        (not_atomic, "checkpoint.save_checkpoint(state, path)", "torch.save(state, path)"),
    )
}


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


def one_line(function) -> str:
    return " ".join(function.__doc__.split())


def run_rank(rank: int, names: list[str], place: str, report: Path | None) -> None:
    repair_output()
    torch.set_num_threads(1)
    store = dist.FileStore(f"{place}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    seconds = {}
    for name in names:
        experiment, right, wrong = EXPERIMENTS[name]
        print0(f"{name}: {one_line(experiment)}\n    - {right}\n    + {wrong}")
        t0 = time.perf_counter()
        for broken in (False, True):
            for what, value in experiment(rank, broken).items():
                print0(f"    {'broken' if broken else 'right '}  {what}: {show(value)}")
        seconds[name] = round(time.perf_counter() - t0, 1)
        print0(f"    took {seconds[name]} s")
    if rank == 0 and report:
        record = {"script": "lab", "seconds": seconds, "host": machine.host()}
        report.write_text(json.dumps(record, indent=1) + "\n")
    utils.cleanup_distributed()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"tour, {', '.join(EXPERIMENTS)}")
    parser.add_argument("--report", type=Path, help="write the seconds of each to this file")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in {*EXPERIMENTS, "tour"}]:
        sys.exit(f"error: no experiment {unknown[0]}; without a name all are listed")
    if not args.names:
        for name, (experiment, _, _) in EXPERIMENTS.items():
            print(f"{name:24}{one_line(experiment)}")
        if not sys.stdin or not sys.stdin.isatty():
            return
        try:
            if input("Enter: take the tour; q: leave ").strip():
                return
        except EOFError:
            return
    names = [*EXPERIMENTS] if not args.names or "tour" in args.names else args.names
    if args.report:
        with one_line_errors():
            args.report.open("a").close()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(run_rank, (names, place, args.report), nprocs=2)


if __name__ == "__main__":
    main()
