"""AG News: where it comes from, how it is tokenised once, and which rows each rank trains on."""

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

LABELS = ("World", "Sports", "Business", "Sci/Tech")  # label 0 to 3, in AG News's own order
HUB_DATASET = "fancyzhx/ag_news"
KAGGLE_INPUT = Path("/kaggle/input")
SAMPLE = Path(__file__).parent / "sample_data"
VALIDATION = 0.05  # of train, from every class alike
IGNORED = -100  # cross_entropy leaves rows with this label out


SAMPLE_NOTE = """
+--------------------------------------------------------------------------+
| This is the bundled sample: 600 short items written for this repository.  |
| An accuracy on it is not an AG News figure. For AG News itself, set       |
| AG_NEWS_DIR, pass --data FOLDER, or run where the Hub can be reached.     |
+--------------------------------------------------------------------------+"""


class DataError(Exception):
    """Missing or malformed data; the message is one line and names file, line and remedy."""


# Sources


@dataclass
class News:
    texts: list[str]
    labels: list[int]


def parse_rows(rows: Iterable[tuple[int, list[str]]], where: str) -> News:
    """(line number, cells) -> News, from the three forms in circulation; the first row tells which.

    `text,label` with a header and labels 0-3; `Class Index,Title,Description` with a header and
    classes 1-4; class 1-4, title, description without a header.
    """
    rows = iter(rows)
    line, first = next(rows, (1, None))
    if first is None:
        raise DataError(f"{where} is empty; expected rows of AG News")
    header = [cell.strip().lower() for cell in first]
    if sorted(header) == ["label", "text"]:
        label_at, text_at, lowest, pending = header.index("label"), [header.index("text")], 0, []
    elif header == ["class index", "title", "description"]:
        label_at, text_at, lowest, pending = 0, [1, 2], 1, []
    elif len(first) == 3 and header[0] in {"1", "2", "3", "4"}:
        label_at, text_at, lowest, pending = 0, [1, 2], 1, [(line, first)]
    else:
        raise DataError(
            f"{where} line {line}: {len(first)} columns that begin {first[0][:30]!r}; expected a "
            "header 'text,label' or 'Class Index,Title,Description', or three columns: class 1-4, "
            "title, description"
        )
    news = News([], [])
    for line, cells in [*pending, *rows]:
        if len(cells) != len(first):
            raise DataError(
                f"{where} line {line}: {len(cells)} columns; the lines above have {len(first)}"
            )
        label, text = cells[label_at].strip(), " ".join(cells[i].strip() for i in text_at).strip()
        if label not in {str(lowest + i) for i in range(len(LABELS))}:
            raise DataError(
                f"{where} line {line}: label {label[:20]!r}; expected {lowest} to {lowest + 3}"
            )
        if not text:
            raise DataError(f"{where} line {line}: no text; delete the line or fill it")
        news.texts.append(text)
        news.labels.append(int(label) - lowest)
    if not news.texts:
        raise DataError(f"{where} has a header and no rows")
    return news


def read_news(path: Path) -> News:
    """A .csv or .parquet file as News."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}"
            ) from None
        cells = zip(*(map(str, column.to_pylist()) for column in table.columns), strict=True)
        return parse_rows(enumerate([table.column_names, *map(list, cells)]), str(path))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            return parse_rows(((reader.line_num, cells) for cells in reader if cells), str(path))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def split_file(folder: Path, split: str) -> Path:
    for name in (f"{split}.csv", f"{split}.parquet"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no {split}.csv or {split}.parquet")


def read_folder(folder: Path) -> tuple[News, News]:
    if not folder.is_dir():
        raise DataError(
            f"no such folder: {folder}; --data takes auto, ag_news, sample or a folder with "
            "train.csv and test.csv"
        )
    return read_news(split_file(folder, "train")), read_news(split_file(folder, "test"))


def read_hub() -> tuple[News, News]:
    """AG News from the Hugging Face cache, else from the Hub."""
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(HUB_DATASET)
    except Exception as error:  # a dead network, an empty cache, a Hub that answers nonsense
        raise DataError(
            f"{HUB_DATASET} is neither in the Hugging Face cache nor to be had from the Hub "
            f"({type(error).__name__}); use --data sample, or a folder with train.csv and test.csv"
        ) from None
    train, test = (
        News(list(splits[s]["text"]), list(splits[s]["label"])) for s in ("train", "test")
    )
    return train, test


def kaggle_folder() -> Path | None:
    """The attached Kaggle dataset that reads as AG News, wherever it is mounted."""
    for train in sorted(KAGGLE_INPUT.rglob("train.csv")):
        try:
            with open(train, encoding="utf-8-sig", newline="") as file:
                parse_rows([(1, next(csv.reader(file))), (2, next(csv.reader(file)))], "")
            split_file(train.parent, "test")
        except (DataError, OSError, StopIteration, csv.Error, UnicodeDecodeError):
            continue
        return train.parent
    return None


def read_source(choice: str) -> tuple[News, News, str, str]:
    """`--data` -> (train, test, source, why).

    Only `auto` falls back; a source named outright is taken or refused.
    """
    if choice == "sample":
        return *read_folder(SAMPLE), "sample", "named"
    if choice == "ag_news":
        return *read_hub(), HUB_DATASET, "named"
    if choice != "auto":
        return *read_folder(Path(choice)), f"folder {Path(choice).name}", "named"
    if folder := os.environ.get("AG_NEWS_DIR"):
        return *read_folder(Path(folder)), f"folder {Path(folder).name}", "AG_NEWS_DIR is set"
    if folder := kaggle_folder():
        return *read_folder(folder), f"Kaggle input {folder.name}", f"found below {KAGGLE_INPUT}"
    try:
        return *read_hub(), HUB_DATASET, "from the Hugging Face cache or Hub"
    except DataError:
        return (
            *read_folder(SAMPLE),
            "sample",
            "no AG_NEWS_DIR, no Kaggle input, not cached, and the Hub does not answer",
        )


# Tokens


class TokenizedNews(Dataset):
    """Rows of token ids in one flat array; item i is (ids, label).

    Item -1 - i is row i with its label ignored: it costs what a row costs, and counts for nothing.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray, labels: np.ndarray, rows: np.ndarray):
        self.ids, self.rows = ids, rows
        self.stops = ends[rows]
        self.lengths = np.diff(ends, prepend=0)[rows]
        self.labels = labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        row = max(i, -1 - i)
        start = self.stops[row] - self.lengths[row]
        label = int(self.labels[row]) if i >= 0 else IGNORED
        return torch.from_numpy(self.ids[start : self.stops[row]]), label


@dataclass
class Data:
    train: TokenizedNews
    val: TokenizedNews
    test: TokenizedNews
    source: str
    why: str
    fingerprint: str  # of the tokens and labels that training sees
    note: str  # what a reader of its accuracy has to know


def load_tokenizer(folder: Path):
    """The tokenizer of a backbone folder."""
    from transformers import AutoTokenizer  # here: it takes seconds, and not every rank tokenises

    return AutoTokenizer.from_pretrained(folder)


def tokenize(texts: list[str], folder: Path, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """All texts in one batched call -> (ids of all rows end to end, where each row ends)."""
    rows = load_tokenizer(folder)(texts, truncation=True, max_length=max_length)["input_ids"]
    ends = np.cumsum([len(row) for row in rows])
    return np.fromiter((i for row in rows for i in row), np.int64, ends[-1]), ends


def cached_tokens(texts: list[str], folder: Path, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokenize`, kept in the Hugging Face cache under a hash of everything it depends on.

    The first process takes the lock and tokenises, the others wait for the file. A lock has no
    time-out; a barrier has, and the run would end there when tokenising takes longer.
    """
    from huggingface_hub.constants import HF_HOME

    key = hashlib.sha256(f"{max_length}".encode())
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        if (folder / name).is_file():
            key.update((folder / name).read_bytes())
    key.update("\0".join(texts).encode("utf-8", "surrogatepass"))
    path = Path(HF_HOME) / "distrinews" / f"{key.hexdigest()[:24]}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.is_file():
                try:
                    with np.load(path) as kept:
                        return kept["ids"], kept["ends"]
                except Exception:  # damaged, in one of many ways: written again
                    pass
            ids, ends = tokenize(texts, folder, max_length)
            with open(path.with_suffix(".tmp"), "wb") as file:
                np.savez(file, ids=ids, ends=ends)
            os.replace(path.with_suffix(".tmp"), path)
            return ids, ends
    except OSError:  # a cache folder that is full or cannot be written: work without it
        return tokenize(texts, folder, max_length)


def split_validation(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows of train, rows of validation): the same 5 % of every class at any seed."""
    order = np.random.default_rng(0).permutation(len(labels))
    held_out = [order[labels[order] == c] for c in range(len(LABELS))]
    held_out = np.concatenate(
        [rows[: max(1, round(VALIDATION * len(rows)))] for rows in held_out if len(rows) > 1]
    )
    return np.setdiff1d(order, held_out), np.sort(held_out)


def prepare_data(
    choice: str,
    tokenizer_folder: Path,
    max_length: int,
    max_train: int | None,
    max_eval: int | None,
) -> Data:
    """Reads, splits, cuts and tokenises. Every rank may call it at once: one works, others wait."""
    train, test, source, why = read_source(choice)
    labels = np.array(train.labels + test.labels)
    n = len(train.labels)
    if missing := sorted(set(range(len(LABELS))) - set(train.labels)):
        raise DataError(
            f"{source}: no training row is labelled {LABELS[missing[0]]}; all four are "
            "needed"
        )
    train_rows, val_rows = split_validation(labels[:n])
    if len(train_rows) < len(LABELS):
        raise DataError(
            f"{source}: {len(train_rows)} training rows after validation is set aside; expected at "
            f"least {len(LABELS)}, one for each class"
        )
    # a cut is a random part, since a file may be sorted; the same part at every seed
    train_rows = np.random.default_rng(1).permutation(train_rows)[:max_train]
    val_rows = np.random.default_rng(2).permutation(val_rows)[:max_eval]
    test_rows = n + np.random.default_rng(3).permutation(len(test.labels))[:max_eval]
    ids, ends = cached_tokens(train.texts + test.texts, tokenizer_folder, max_length)
    splits = [TokenizedNews(ids, ends, labels, rows) for rows in (train_rows, val_rows, test_rows)]
    fingerprint = hashlib.sha256()
    for array in (ids, ends, labels, train_rows):
        fingerprint.update(np.ascontiguousarray(array, np.int64).tobytes())
    note = SAMPLE_NOTE if source == "sample" and choice == "auto" else ""
    return Data(*splits, source, why, fingerprint.hexdigest()[:16], note)


# Batches


def collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, padded to the longest of them -> input_ids, attention_mask (batch, tokens), labels."""
    input_ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    attention_mask = torch.arange(input_ids.size(1)) < lengths[:, None]
    return input_ids, attention_mask, torch.tensor([label for _, label in rows])


class LengthWindows(Sampler[list[int]]):
    """This rank's row numbers for each optimizer step, rows of like length together.

    `sampler` gives this rank's share of a seeded permutation. Every 50 steps of it are sorted by
    length, cut into steps, and the steps shuffled; the cuts and the shuffle are the same on every
    rank, so step k is about as long everywhere and no rank waits. What is left at the end of an
    epoch is its last, smaller step. DistributedSampler repeats up to world_size - 1 rows so that
    all shares are equally long; here a repeat comes as -1 - row, with its label ignored.
    """

    def __init__(self, sampler, lengths: np.ndarray, global_batch_size: int, window: int = 50):
        self.sampler, self.lengths, self.window = sampler, lengths, window
        self.global_batch_size = global_batch_size
        # a DistributedSampler knows its share; any other sampler gives all rows to one process
        self.rank, self.world_size = (
            getattr(sampler, "rank", 0),
            getattr(sampler, "num_replicas", 1),
        )
        if len(lengths) < self.world_size:
            raise DataError(
                f"{len(lengths)} training rows for {self.world_size} processes; each needs one"
            )
        self.start = 0  # the first step to give, when an interrupted epoch goes on

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.global_batch_size)

    def row_count(self, step: int) -> int:
        """Rows that count in a step, over all ranks: a full batch, or what the epoch has left."""
        return min(self.global_batch_size, len(self.lengths) - step * self.global_batch_size)

    def by_length(self, rows: list[int]) -> list[int]:
        return sorted(rows, key=lambda row: self.lengths[max(row, -1 - row)])

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.sampler)
        if (len(rows) - 1) * self.world_size + self.rank >= len(self.lengths):
            rows[-1] = -1 - rows[-1]
        per_step = self.global_batch_size // self.world_size
        in_windows = len(self.lengths) // self.global_batch_size * per_step
        steps = []
        for start in range(0, in_windows, self.window * per_step):
            window = self.by_length(rows[start : min(start + self.window * per_step, in_windows)])
            cut = [window[i : i + per_step] for i in range(0, len(window), per_step)]
            steps += [
                cut[i] for i in np.random.default_rng(start * self.world_size).permutation(len(cut))
            ]
        if rest := rows[in_windows:]:
            steps.append(self.by_length(rest))
        yield from steps[self.start :]


def train_loader(
    data: TokenizedNews, steps: LengthWindows, micro_batch_size: int, pin: bool = False
) -> DataLoader:
    """Gives, for each optimizer step, the list of this rank's micro-batches."""

    def cut(rows):
        return [
            collate(rows[i : i + micro_batch_size]) for i in range(0, len(rows), micro_batch_size)
        ]

    return DataLoader(data, batch_sampler=steps, collate_fn=cut, pin_memory=pin)


def eval_loader(data: TokenizedNews, batch_size: int, rank=0, world_size=1) -> DataLoader:
    """Every row on exactly one rank, none repeated; ranks may hold different counts."""
    mine = np.argsort(data.lengths, kind="stable")[rank::world_size].tolist()
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return DataLoader(data, batch_sampler=batches, collate_fn=collate)
