"""What a step of DDP costs, from pieces that were measured one by one.

Seconds, bytes and FLOP throughout. The ring's cost: Patarasuk and Yuan, Bandwidth optimal
all-reduce algorithms, 2009; nccl-tests calls the rate in it "bus bandwidth". The pipeline of
buckets: Li et al., PyTorch Distributed, VLDB 2020, section 3.2.3.

    step = accumulation x micro-batch + exposed communication + imbalance + update + data
           + the metrics' all-reduce
"""

from bisect import bisect
from dataclasses import dataclass, replace
from functools import partial

from training.model import Config


def flops_per_sample(config, tokens: float) -> float:
    """Floating-point operations that training spends on a row of `tokens` tokens in model.py.

    Two per multiply-add; backward costs twice the forward. In the last layer only keys and values
    see all tokens: queries, output and feed-forward are computed for the first one alone.
    """
    d, h, t = config.dim, config.hidden_dim, tokens
    layer = 2 * t * (4 * d * d + 2 * d * h) + 4 * t * t * d
    last = 2 * t * 2 * d * d + 2 * (2 * d * d + 2 * d * h) + 4 * t * d
    head = 2 * (d * d + d * config.num_labels)
    return 3 * ((config.n_layers - 1) * layer + last + head)


def all_reduce(size: float, world_size: int, latency: float, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes.

    2 (n - 1) messages of size / n each: n - 1 to add up, n - 1 to hand out. `latency` is that of
    one message, `bandwidth` that of one link. At n = 2 every byte crosses the link once each way.
    """
    messages = 2 * (world_size - 1)
    return messages * (latency + size / world_size / bandwidth)


def interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """y at x on straight lines from point to point; the first and the last line are extended.

    One line will not do: activations that leave the caches make every further token costlier.
    """
    right = min(max(1, bisect([known for known, _ in points], x)), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def ready_times(buckets: list[float], embeddings: float, backward: float) -> list[float]:
    """When, counted from its start, backward has filled each bucket, in the order of filling.

    Backward goes through the layers from the last to the first, at about the same time per byte of
    weights; the `embeddings` bytes have almost no arithmetic and come at the very end.
    """
    layers, filled, times = sum(buckets) - embeddings, 0.0, []
    for size in buckets:
        filled += size
        times.append(backward * min(1.0, filled / layers))
    return times


def exposed(ready: list[float], seconds: list[float], backward: float) -> float:
    """Communication that backward does not hide: one all-reduce at a time, each from when its
    bucket is ready and the one before is done."""
    end = 0.0
    for start, spent in zip(ready, seconds, strict=True):
        end = max(end, start) + spent
    return max(0.0, end - backward)


@dataclass(frozen=True)
class Pieces:
    """What one kind of launch (world size, threads) costs; see `step`."""

    compute: tuple[tuple[float, float], ...]  # (padded tokens, forward and backward of them)
    update: float  # clip and optimizer, once per step
    data: float  # collating, for every token
    sync_flags: float  # the all-reduce of metrics and stop flags, once per step
    imbalance: float  # part of compute by which the slowest rank exceeds the mean
    buckets: tuple[float, ...] = ()  # bytes of gradients, in the order of filling
    seconds: tuple[float, ...] = ()  # of each bucket's all-reduce, nothing else running
    embeddings: float = 0.0  # bytes of gradients that backward reaches last
    overlap: bool = False  # whether communication has hardware of its own, as on a GPU


def step(pieces: Pieces, tokens: float, accumulation: int = 1) -> float:
    """Seconds of an optimizer step of `accumulation` micro-batches of `tokens` padded tokens each.

    On a CPU whose cores all compute, communication takes the cores away from backward, so none of
    it is hidden. On a GPU it runs beside backward. Backward is two thirds of a micro-batch.
    """
    micro = interpolate(pieces.compute, tokens)
    if pieces.overlap:
        backward = micro * 2 / 3
        ready = ready_times(list(pieces.buckets), pieces.embeddings, backward)
        shown = exposed(ready, list(pieces.seconds), backward)
    else:
        shown = sum(pieces.seconds)
    compute = accumulation * micro * (1 + pieces.imbalance)
    data = accumulation * tokens * pieces.data
    return compute + shown + pieces.update + pieces.sync_flags + data


def waterfall(one: dict, alone: dict, no_communication: dict, no_sync: dict, ddp: dict) -> dict:
    """{name: seconds} that lead from one process's step to that of DDP at the same global batch.

    `one` is a process at the global batch; `alone` at its share of it, nothing else running;
    `no_communication` the same in every process at once; `no_sync` and `ddp` the wrapped model
    without and with its all-reduce. Each: {"step", "update", "imbalance"} in seconds. The entries
    between the first two and the last are what was lost; they add up to it exactly.
    """
    world_size = ddp["world_size"]
    ideal = one["step"] / world_size
    serial = alone["update"] - one["update"] / world_size
    lost = {
        "update, done by every rank": serial,
        "smaller batches": alone["step"] - ideal - serial,
        "contention for the machine": no_communication["step"] - alone["step"],
        "imbalance of the ranks": no_sync["imbalance"],
        "exposed communication": ddp["step"] - no_sync["step"],
    }
    unexplained = ddp["step"] - ideal - sum(lost.values())
    ends = {"one process": one["step"], "ideal share": ideal}
    return ends | lost | {"unexplained": unexplained, "DDP, measured": ddp["step"]}


# GPUs, from published figures. What follows was never compared with a measurement.


@dataclass(frozen=True)
class Gpu:
    """What a GPU and its link do; the pages show each with its source."""

    rate: float  # FLOP/s
    fixed: float  # seconds per step: the optimizer, launches
    bandwidth: float  # bytes/s of the link
    latency: float  # seconds per message


# Kaggle's T4s: pessimistic, likely, optimistic
T4 = [Gpu(12e12, 20e-3, 1.5e9, 12e-6), Gpu(18e12, 13e-3, 4e9, 12e-6), Gpu(24e12, 8e-3, 8e9, 12e-6)]
# A cluster: a third of the 312 TFLOP/s that an A100 has in bf16; Ethernet and InfiniBand at their
# line rates, NVLink at two thirds of an A100's 300 GB/s a direction.
# name: (bytes/s of a GPU's link, the largest number of GPUs that it joins)
LINKS = {
    "NVLink, 200 GB/s": (200e9, 8),
    "400 Gb InfiniBand": (50e9, 64),
    "100 Gb Ethernet": (12.5e9, 64),
    "25 Gb Ethernet": (3.125e9, 64),
    "10 Gb Ethernet": (1.25e9, 64),
}
CLUSTER_GPU = Gpu(104e12, 5e-3, 0, 10e-6)
CLUSTER_SIZES = (2, 4, 8, 16, 32, 64)
# DistilBERT-base's gradients. The buckets are those of DDP's log, from the second step on.
BUCKETS = (2371600, *[28351488] * 6, 95345664)
ROW = 768 * 4  # bytes of a word's embedding
WORDS = 30522 * ROW
EMBEDDINGS = WORDS + 512 * ROW  # and the positions'
TOKENS = 52.5  # mean length of AG News's rows
EPOCH_ROWS = 114_000  # of AG News's 120,000, less the 5 % set aside for validation


def gpu_step(
    gpu: Gpu,
    flop: float,
    rows: int,
    world_size: int = 1,
    accumulation: int = 1,
    compressed: bool = False,
    touched: int | None = None,
    buckets: tuple[int, ...] = BUCKETS,
) -> float:
    """Seconds of a step of `rows` rows per micro-batch, each of `flop` floating-point operations.

    `compressed`: gradients are sent in 16 bits. `touched`: only so many rows of the word embeddings
    are sent.
    """
    compute = ((0, 0), (1, flop / gpu.rate))  # of rows, not tokens
    size, embeddings = 0.5 if compressed else 1.0, EMBEDDINGS
    if touched is not None:
        saved = WORDS - touched * ROW
        buckets, embeddings = (*buckets[:-1], buckets[-1] - saved), embeddings - saved
    sent = tuple(size * bucket for bucket in buckets)
    # one process sends no message, so it takes no time
    seconds = tuple(all_reduce(b, world_size, gpu.latency, gpu.bandwidth) for b in sent)
    pieces = Pieces(compute, gpu.fixed, 0, 0, 0, sent, seconds, size * embeddings, True)
    return step(pieces, rows, accumulation)


def t4(rows: int, world_size: int, vary: str = "bandwidth", **how) -> list[float]:
    """Seconds of DistilBERT's step on T4s: pessimistic, likely, optimistic in the link or card."""
    flop, cards = flops_per_sample(Config(), TOKENS), T4
    if vary == "bandwidth":
        cards = [replace(T4[1], bandwidth=card.bandwidth) for card in T4]
    return [gpu_step(card, flop, rows, world_size, **how) for card in cards]


def t4_rate(world_size: int) -> list[float]:
    """Samples/s at 32 rows per card."""
    vary = "card" if world_size == 1 else "bandwidth"
    return [32 * world_size / seconds for seconds in t4(32, world_size, vary)]


def t4_minutes(world_size: int) -> list[float]:
    return [EPOCH_ROWS / rate / 60 for rate in t4_rate(world_size)]


def t4_strong(rows: int) -> list[float]:
    """One card over two at the same global batch, 2 x rows."""
    return [one / two for one, two in zip(t4(2 * rows, 1), t4(rows, 2), strict=True)]


def t4_weak(rows: int, accumulation: int = 1, **how) -> list[float]:
    one, two = (t4(rows, n, accumulation=accumulation, **how) for n in (1, 2))
    return [2 * a / b for a, b in zip(one, two, strict=True)]


def t4_levers(touched: float | None) -> list[tuple[str, dict]]:
    """(what, arguments of gpu_step) of what shortens communication."""
    levers = [("plain", {}), ("`--grad-compression fp16`", {"compressed": True})]
    if touched:
        levers += [("`--sparse-embeddings`", {"touched": touched})]
        levers += [("both", {"compressed": True, "touched": touched})]
    return [*levers, ("4 accumulated", {"accumulation": 4})]


def cluster() -> list[tuple[str, str, list[float | None]]]:
    """(how, link, efficiency of each of CLUSTER_SIZES): n GPUs' samples/s over n times one's."""
    accumulated = {"rows": 128, "accumulation": 4, "compressed": True}
    ways = {"32 rows per GPU": {"rows": 32}, "128 rows per GPU": {"rows": 128}}
    ways["4 x 128 rows accumulated, 16-bit gradients"] = accumulated
    flop = flops_per_sample(Config(), TOKENS)
    table = []
    for name, how in ways.items():
        for link, (bandwidth, largest) in LINKS.items():
            seconds = partial(gpu_step, replace(CLUSTER_GPU, bandwidth=bandwidth), flop, **how)
            cells = [seconds() / seconds(world_size=n) for n in CLUSTER_SIZES if n <= largest]
            table.append((name, link, cells + [None] * (len(CLUSTER_SIZES) - len(cells))))
    return table
