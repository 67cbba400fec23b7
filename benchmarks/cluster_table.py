"""Writes the tables of docs/cluster.md: python -m benchmarks.cluster_table

What the cost model predicts for clusters that nobody here measured, and what others published.
"""

import re
from functools import cache
from pathlib import Path

import torch

from benchmarks.cost_model import Pieces, all_reduce, flops_per_sample, step
from training.model import Config, NewsClassifier

PAGE = Path(__file__).parent.parent / "docs" / "cluster.md"
WORLD_SIZES = (2, 4, 8, 16, 32, 64)
RATE = 104e12  # FLOP/s: a third of the 312e12 that an A100 has in bf16
FIXED = 5e-3  # seconds a step for optimizer and launches
LATENCY = 10e-6  # seconds a message
TOKENS = 52.5  # mean length of AG News's rows
# name: (bytes/s of a GPU's link, the largest number of GPUs that it joins)
LINKS = {
    "NVLink, 200 GB/s": (200e9, 8),
    "400 Gb InfiniBand": (50e9, 64),
    "100 Gb Ethernet": (12.5e9, 64),
    "25 Gb Ethernet": (3.125e9, 64),
    "10 Gb Ethernet": (1.25e9, 64),
}
# name: (rows a forward, forwards a step, part of the gradients' bytes that is sent)
WAYS = {
    "32 rows a GPU": (32, 1, 1.0),
    "128 rows a GPU": (128, 1, 1.0),
    "4 x 128 rows accumulated, 16-bit gradients": (128, 4, 0.5),
}
PUBLISHED = (
    ("BERT of Hugging Face, 2 GPUs of one server", "0.94", "pytorch/pytorch#17159"),
    ("the same, 8 GPUs of one server", "0.90", "pytorch/pytorch#17159"),
    ("the same, 2 servers with 8 each", "0.66", "pytorch/pytorch#17159"),
    (
        "DistilBERT on IMDB, 4 A100, from the minutes of a run",
        "0.62",
        "sebastianraschka.com, pytorch-faster, 2023",
    ),
    ("Inception V3 and ResNet-101, 512 GPUs, 25 Gb RoCE", "0.90", "horovod/horovod, docs"),
    ("VGG-16, many weights for its work, the same", "0.68", "horovod/horovod, docs"),
)


@cache
def buckets() -> list[int]:
    """Bytes of DistilBERT-base's gradients as backward makes them: head, layers, embeddings."""
    with torch.device("meta"):
        model = NewsClassifier(Config())
    layers = [*reversed(model.distilbert.transformer.layer), model.distilbert.embeddings]
    sizes = [sum(4 * p.numel() for p in layer.parameters()) for layer in layers]
    return [sum(4 * p.numel() for p in model.parameters()) - sum(sizes), *sizes]


def efficiency(world_size: int, bandwidth: float, rows: int, forwards: int, sent: float) -> float:
    """Samples/s of `world_size` GPUs over that many times those of one with the same rows."""
    sizes = [sent * size for size in buckets()]
    seconds = [all_reduce(size, world_size, LATENCY, bandwidth) for size in sizes]
    compute = ((0, 0), (1, flops_per_sample(Config(), TOKENS) / RATE))  # of rows
    alone = Pieces(compute, FIXED, 0, 0, 0)
    ddp = Pieces(compute, FIXED, 0, 0, 0, sizes, seconds, sizes[-1], True)
    return step(alone, rows, forwards) / step(ddp, rows, forwards)


def predicted() -> str:
    lines = [f"| | link | {' | '.join(f'{n} GPUs' for n in WORLD_SIZES)} |"]
    lines.append("|---|---|" + "---|" * len(WORLD_SIZES))
    for way, settings in WAYS.items():
        for link, (bandwidth, most) in LINKS.items():
            cells = [
                f"*≈ {efficiency(n, bandwidth, *settings):.2f}*" if n <= most else "-"
                for n in WORLD_SIZES
            ]
            lines.append(f"| {way} | {link} | {' | '.join(cells)} |")
    return "\n".join(lines)


def published() -> str:
    rows = "\n".join(f"| {' | '.join(row)} |" for row in PUBLISHED)
    return f"| what | efficiency | source |\n|---|---|---|\n{rows}"


def written(page: str) -> str:
    """The page with both tables between their markers."""
    for name, table in (("predicted", predicted()), ("published", published())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        page, found = re.subn(pattern, rf"\g<1>{table}\n\g<2>", page, flags=re.DOTALL)
        assert found == 1, f"{PAGE} has {found} places for the {name} table, expected 1"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
