"""Times the pieces of a training step, in one process or as a rank; bench_training.py starts it.

python -m benchmarks.step_pieces PLAN.json OUT.json

The step is that of training/train_ddp.py, cut where a clock has to be read. Its rows are real: step
s of n takes those around quantile (s + 1/2)/n of length, so every batch size sees the same mean.
OUT.json is a list of flat rows, one a measurement.
"""

import copy
import gc
import json
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer

from training import comm_hooks, machine, utils
from training.ag_news import find_data
from training.comm_hooks import all_reduce_rows, register_comm_hook
from training.dataset import collate, prepare_data
from training.model import Config, load_backbone

DTYPES = comm_hooks.DTYPES | {"fp32": torch.float32}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gemm_rate(config: Config, dtype: torch.dtype, device: torch.device, rows=32, seconds=2.0):
    """FLOP/s of the model's own matmuls, a batch of 52-token rows, back to back."""
    m, d, h = rows * 52, config.dim, config.hidden_dim
    # in the proportion of a layer: query, key, value, output; up; down
    shapes = [(d, d, 4), (d, h, 1), (h, d, 1)]
    random = partial(torch.randn, dtype=dtype, device=device)
    pairs = [(random(m, k), random(n, k), times) for k, n, times in shapes]

    def one_pass():
        for x, w, times in pairs:
            for _ in range(times):
                F.linear(x, w)

    threads = torch.get_num_threads()
    timer = Timer("one_pass()", globals={"one_pass": one_pass}, num_threads=threads)
    flops = sum(2 * m * k * n * times for k, n, times in shapes)
    return flops / timer.blocked_autorange(min_run_time=seconds).median


def average(gradient: Tensor, dtype: torch.dtype) -> None:
    """What DDP, or its hook with compression, does with a bucket."""
    sent = gradient.to(dtype).div_(dist.get_world_size())
    dist.all_reduce(sent)
    if sent is not gradient:
        gradient.copy_(sent)


class Rank:
    """One process: its model, and the clock beside its steps."""

    def __init__(self, plan: dict):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device, backend = utils.choose_device("auto", int(os.environ.get("LOCAL_RANK", 0)))
        if self.world_size > 1:  # as in train_ddp.py
            dist.init_process_group("cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo")
        torch.manual_seed(0)
        folder = Path(plan["backbone"])
        self.data = prepare_data(find_data(plan["source"]), folder, 128, None, 8).train
        self.order = self.data.lengths.argsort(kind="stable")
        self.raw_model = load_backbone(folder).to(self.device)
        self.models = {}

    def kind(self, setting: dict) -> tuple[bool, str, bool, bool]:
        """(whether DDP wraps it, its compression, sparse embeddings, whether it is compiled)."""
        wrapped = setting["variant"] in ("ddp", "no_sync")
        return wrapped, setting["compression"], setting["sparse_embeddings"], setting["compiled"]

    def model(self, setting: dict) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model of a setting and its optimizer, one pair at a time: beside others it is slower.

        lr 0: the work is the same and the weights stay, also on ranks without communication.
        """
        kind = self.kind(setting)
        if kind not in self.models:
            self.models = {}
            gc.collect()  # a wrapper and its hooks hold each other
            model = copy.deepcopy(self.raw_model)
            optimizer = utils.make_optimizer(model, 0.0)
            if kind[0]:
                devices = [self.device] if self.device.type == "cuda" else None
                model = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
                register_comm_hook(model, kind[1], kind[2])
            if kind[3]:
                model = torch.compile(model, dynamic=True)
            self.models[kind] = model, optimizer
        return self.models[kind]

    def rows(self, setting: dict, number: int) -> list[list[int]]:
        """This rank's row numbers for the micro-batches of a step."""
        micro, k = setting["micro"], setting["accumulation"]
        count = micro * k * self.world_size
        centre = int(len(self.order) * (number + 0.5) / setting["steps"])
        start = min(max(0, centre - count // 2), max(0, len(self.order) - count))
        positions = range(start + self.rank, start + count, self.world_size)
        mine = [self.order[position % len(self.order)] for position in positions]
        return [mine[i * micro : (i + 1) * micro] for i in range(k)]

    def step(self, setting: dict, number: int) -> dict[str, float]:
        """One optimizer step: the seconds of its pieces, and its padded tokens a micro-batch."""
        model, optimizer = self.model(setting)
        variant, precision = setting["variant"], setting["precision"]
        autocast = utils.autocast(self.device, precision)
        scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        to_device = partial(Tensor.to, device=self.device, non_blocking=True)
        rows = self.rows(setting, number)
        times = [now(self.device)]
        batches = [collate([self.data[i] for i in micro]) for micro in rows]
        times.append(now(self.device))
        for micro_step, (input_ids, attention_mask, labels) in enumerate(batches, 1):
            sync = variant == "ddp" and micro_step == len(batches)
            no_sync = variant in ("ddp", "no_sync") and not sync
            with autocast, model.no_sync() if no_sync else nullcontext():
                logits = model(to_device(input_ids), to_device(attention_mask)).float()
            loss = F.cross_entropy(logits, to_device(labels), reduction="sum")
            scaler.scale(loss / sum(map(len, rows))).backward()
        times.append(now(self.device))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        times.append(now(self.device))
        if variant != "no_communication":
            utils.all_reduce_sum([0.0, 0.0, 0.0])
        times.append(now(self.device))
        pieces = [after - before for before, after in zip(times, times[1:], strict=False)]
        named = dict(zip(("data", "compute", "update", "sync_flags"), pieces, strict=True))
        tokens = fmean(input_ids.numel() for input_ids, _, _ in batches)
        return named | {"step": times[-1] - times[0], "tokens": tokens}

    def measure(self, setting: dict) -> dict:
        """The mean over the setting's steps of each piece; over ranks the mean, of `step` the max.

        `imbalance`: by how much the slowest rank's compute exceeds the mean, averaged over steps.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # fresh memory, kernels to choose, and DDP orders its buckets anew after its first step
        new = self.kind(setting) not in self.models
        for _ in range(3 if new or self.device.type == "cuda" else 1):
            self.step(setting, setting["steps"] // 2)
        if self.world_size > 1:
            dist.barrier()
        steps = [self.step(setting, number) for number in range(setting["steps"])]
        mine = {name: fmean(step[name] for step in steps) for name in steps[0]}
        computes = [step["compute"] for step in steps]
        ranks = [(mine, computes)]
        if self.world_size > 1:
            ranks = [None] * self.world_size
            dist.all_gather_object(ranks, (mine, computes))
        figures = {name: fmean(means[name] for means, _ in ranks) for name in mine}
        figures["step"] = max(means["step"] for means, _ in ranks)
        by_step = list(zip(*(computes for _, computes in ranks), strict=True))
        figures["imbalance"] = fmean(max(one) - fmean(one) for one in by_step)
        figures["peak_memory_mb"] = machine.peak_memory_mb(self.device)
        return figures

    def measured(self, setting: dict) -> dict:
        """A row of `measure`; where torch.compile finds no compiler, a row that says so."""
        try:
            return {"kind": "step"} | setting | self.measure(setting)
        except Exception as error:
            if not setting["compiled"]:
                raise
            return {"kind": "failed", "name": "torch.compile", "error": str(error).splitlines()[0]}

    def buckets(self) -> list[int]:
        """The bytes of DDP's buckets in the order in which backward fills them, as a hook sees them
        in the second step: in the first backward DDP does not know that order yet."""
        model, sizes = DistributedDataParallel(copy.deepcopy(self.raw_model)), []

        def note(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            sizes.append(bucket.buffer().nbytes)
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, note)
        input_ids, attention_mask, _ = collate([self.data[0]])
        for _ in range(2):
            sizes.clear()
            model(input_ids.to(self.device), attention_mask.to(self.device)).sum().backward()
        return sizes

    def timed(self, work, repeats=5) -> float:
        """The median seconds of `work`, which all ranks begin together; of the slowest rank."""
        times = []
        for _ in range(repeats + 1):
            dist.barrier()
            t0 = now(self.device)
            own_seconds = work()  # the seconds that count, if it returns them
            spent = torch.tensor(own_seconds or now(self.device) - t0)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            times.append(float(spent))
        return median(times[1:])

    def all_reduce(self, size: int, compression: str) -> float:
        """Seconds of what DDP does with a bucket of `size` bytes, nothing else running."""
        bucket = torch.ones(size // 4, device=self.device)
        return self.timed(lambda: average(bucket, DTYPES[compression]))

    def sparse_embeddings(self, micro: int) -> dict:
        """Seconds to share the word embeddings' gradient whole, and only the rows touched by a
        step of `micro` rows in each process."""
        words = self.raw_model.distilbert.embeddings.word_embeddings.weight.detach()
        [mine] = self.rows({"micro": micro, "accumulation": 1, "steps": 1}, 0)
        input_ids, _, _ = collate([self.data[i] for i in mine])
        touched = input_ids.unique().to(self.device)
        gradient = torch.zeros_like(words)
        gradient[touched] = 1.0

        def sparse():  # after the first time both ranks' rows are touched: reset
            gradient.zero_()
            gradient[touched] = 1.0
            t0 = now(self.device)
            all_reduce_rows(gradient, torch.float32)
            return now(self.device) - t0

        dense = self.timed(lambda: average(gradient, torch.float32))
        figures = {"micro": micro, "touched": len(touched), "dense_seconds": dense}
        return figures | {"sparse_seconds": self.timed(sparse)}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    machine.tune_cpu()
    rank = Rank(plan)
    if rank.world_size > 1:
        dist.barrier()
    rate = gemm_rate(rank.raw_model.config, DTYPES[plan["precision"]], rank.device)
    threads = torch.get_num_threads()
    rows = [{"kind": "gemm", "threads": threads, "flops": utils.all_reduce_sum([rate])[0]}]
    rows += [rank.measured(setting) for setting in plan["settings"]]
    if rank.world_size > 1:
        rank.models = {}
        sizes = rank.buckets()
        for compression in sorted({setting["compression"] for setting in plan["settings"]}):
            rows += [
                {"kind": "bucket", "number": number, "bytes": size, "compression": compression}
                | {"seconds": rank.all_reduce(size, compression)}
                for number, size in enumerate(sizes)
            ]
        rows.append({"kind": "sync_flags", "seconds": rank.all_reduce(4096, "none")})
        rows += [{"kind": "embeddings"} | rank.sparse_embeddings(micro) for micro in (8, 32, 128)]
    if rank.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(rows))
    if rank.world_size > 1:
        utils.cleanup_distributed()
    sys.stdout.flush()
    os._exit(0)  # a compiled model's worker threads would hold the process


if __name__ == "__main__":
    main()
