"""What a step of DDP costs, from pieces that were measured one by one.

Seconds, bytes and FLOP throughout. The ring's cost: Patarasuk and Yuan, Bandwidth optimal
all-reduce algorithms, 2009; nccl-tests calls the rate in it "bus bandwidth". The pipeline of
buckets: Li et al., PyTorch Distributed, VLDB 2020, section 3.2.3.

    step = accumulation x micro-batch + exposed communication + imbalance + update + data
"""

from bisect import bisect
from dataclasses import dataclass

MIB = 2**20


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


def between(points: tuple[tuple[float, float], ...], x: float) -> float:
    """y at x on straight lines from point to point; the first and the last line go on for ever.

    One line will not do: activations that leave the caches make every further token dearer.
    """
    right = min(max(1, bisect([at for at, _ in points], x)), len(points) - 1)
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
    for at, spent in zip(ready, seconds, strict=True):
        end = max(end, at) + spent
    return max(0.0, end - backward)


@dataclass(frozen=True)
class Pieces:
    """What one kind of launch (world size, threads) costs; see `step`."""

    compute: tuple[tuple[float, float], ...]  # (padded tokens, forward and backward of them)
    update: float  # clip and optimizer, once a step
    data: float  # collating, for every token
    agree: float  # the ranks' agreement on going on, once a step
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
    micro = between(pieces.compute, tokens)
    if pieces.overlap and pieces.buckets:
        backward = micro * 2 / 3
        ready = ready_times(list(pieces.buckets), pieces.embeddings, backward)
        shown = exposed(ready, list(pieces.seconds), backward)
    else:
        shown = sum(pieces.seconds)
    compute = accumulation * micro * (1 + pieces.imbalance)
    data = accumulation * tokens * pieces.data
    return compute + shown + pieces.update + pieces.agree + data


def waterfall(one: dict, alone: dict, apart: dict, no_sync: dict, ddp: dict) -> list[tuple]:
    """[(name, seconds)] that lead from one process's step to that of DDP at the same global batch.

    `one` is a process at the global batch; `alone` at its share of it, nothing else running;
    `apart` the same in every process at once, none talking; `no_sync` and `ddp` the real thing
    without and with communication. Each: {"step", "update", "imbalance"} in seconds. The steps
    between the first two and the last are what was lost; they add up to it exactly.
    """
    world_size = ddp["world_size"]
    ideal = one["step"] / world_size
    serial = alone["update"] - one["update"] / world_size
    rows = [
        ("one process", one["step"]),
        ("ideal share", ideal),
        ("update, done by every rank", serial),
        ("smaller batches", alone["step"] - ideal - serial),
        ("contention for the machine", apart["step"] - alone["step"]),
        ("imbalance of the ranks", no_sync["imbalance"]),
        ("exposed communication", ddp["step"] - no_sync["step"]),
    ]
    lost = ddp["step"] - ideal - sum(seconds for _, seconds in rows[2:])
    return [*rows, ("unexplained", lost), ("DDP, measured", ddp["step"])]


def gpu(
    flop: float,
    rows: int,
    rate: float,
    fixed: float,
    buckets: list[float],
    embeddings: float,
    world_size: int = 1,
    bandwidth: float = 1.0,
    latency: float = 0.0,
    accumulation: int = 1,
    size: float = 1.0,
) -> float:
    """Seconds of a step on GPUs that nobody measured, from published figures.

    `flop` of a row at `rate` FLOP/s, `fixed` seconds a step for the optimizer and launches; at more
    than one GPU `size` is the part of the gradients' bytes that is sent (half with 16-bit hooks).
    """
    compute = ((0, 0), (1, flop / rate))  # of rows, not tokens
    pieces = Pieces(compute, fixed, 0, 0, 0)
    if world_size > 1:
        sent = tuple(size * bucket for bucket in buckets)
        seconds = tuple(all_reduce(bucket, world_size, latency, bandwidth) for bucket in sent)
        pieces = Pieces(compute, fixed, 0, 0, 0, sent, seconds, size * embeddings, True)
    return step(pieces, rows, accumulation)
