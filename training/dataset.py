"""AG News: where it comes from, how it is tokenised once, and which rows each rank trains on."""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

LABELS = ("World", "Sports", "Business", "Sci/Tech")  # label 0 to 3, in AG News's own order
HUB_DATASET = "fancyzhx/ag_news"
KAGGLE_INPUT = Path("/kaggle/input")
KAGGLE_LARGEST = 1_000_000_000  # bytes; AG News has 30 million, larger files are not looked at
SAMPLE = Path(__file__).parent / "sample_data"
# in order of preference
FORMATS = ".csv .csv.gz .tsv .tsv.gz .jsonl .jsonl.gz .json .json.gz .parquet".split()
COLUMNS = {"label", "text", "class index", "title", "description"}
VALIDATION = 0.05  # of train, from every class alike
WINDOW = 50  # steps whose rows are sorted by length together
# what the standard library and pyarrow raise for files that they cannot read
READ_ERRORS = (OSError, EOFError, zlib.error, ValueError, TypeError, LookupError, AttributeError)
READ_ERRORS += (NotImplementedError,)
MOST_UNKNOWN = 0.1  # share of all tokens; a cased tokenizer on an uncased vocabulary has 0.2
LOCK_TIMEOUT = 600  # seconds to wait while another process tokenises
SAMPLE_NOTE = """
+--------------------------------------------------------------------------+
| This is the bundled sample: 600 short items written for this repository. |
| An accuracy on it is not an AG News figure. For AG News itself, set      |
| AG_NEWS_DIR, pass --data FOLDER, or run where the Hub can be reached.    |
+--------------------------------------------------------------------------+"""


class DataError(Exception):
    """Missing or malformed data; the message is one line and names file, line and remedy."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Files. A reader yields (place in the file, cells), the column names first; ValueError if it cannot


@dataclass
class Examples:
    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # columns that were not used


def read_text(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return raw.decode().removeprefix("\ufeff")  # a byte order mark
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}, byte {error.start}: not UTF-8; save it as UTF-8") from None


def csv_rows(path: Path) -> Iterator[tuple[str, list]]:
    delimiter = "\t" if ".tsv" in path.name else ","
    file = io.StringIO(read_text(path), newline="")
    reader, line = csv.reader(file, delimiter=delimiter, strict=True), 1
    try:
        for cells in reader:
            if cells:
                yield f"line {line}", cells
            line = reader.line_num + 1  # a quoted cell may span several lines
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from None


def json_rows(path: Path) -> Iterator[tuple[str, list]]:
    header = None
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            if not isinstance(row, dict):
                raise ValueError(f"found a JSON {type(row).__name__}")
            json.dumps(row, ensure_ascii=False).encode()  # fails on half a surrogate pair
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {line}: expected a JSON object per line; {error}") from None
        if header is None:
            header = list(row)
            yield f"line {line}", header
        yield f"line {line}", [row.get(name) for name in header]


def table_rows(path: Path) -> Iterator[tuple[str, list]]:
    """Parquet, or the Arrow file that `datasets` caches. A ClassLabel is given by its name."""
    import pyarrow.parquet

    if path.suffix == ".parquet":  # as a file: read_table adds columns for folders named key=value
        table = pyarrow.parquet.ParquetFile(path).read()
    else:
        table = pyarrow.ipc.open_stream(path.read_bytes()).read_all()
    table.validate(full=True)  # corrupted bytes could crash the process below
    info = json.loads((table.schema.metadata or {}).get(b"huggingface", "{}"))
    features = info.get("info", {}).get("features", {})
    yield "header", table.column_names
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        used = name.strip().lower() in COLUMNS  # not every type of another column fits Python
        values = column.to_pylist() if used else [None] * len(column)
        if used and (names := features.get(name, {}).get("names")):
            values = [names[x] if x in range(len(names)) else f"{x} of {names}" for x in values]
        columns.append(values)
    for row, cells in enumerate(zip(*columns, strict=True), 1):
        yield f"row {row}", cells


def parse_rows(rows: Iterator[tuple[str, list]]) -> Examples:
    """The rows of a reader as Examples, from the three forms in circulation.

    Columns `text,label` with labels 0-3; `Class Index,Title,Description` with classes 1-4; or class
    1-4, title, description without a header. Columns may be in any order, a label may be a name.
    """
    place, header = next(rows, ("line 1", []))
    names, pending = [str(cell).strip().lower() for cell in header], []
    if len(names) == 3 and names[0] in {"1", "2", "3", "4"}:
        names, pending = ["class index", "title", "description"], [(place, header)]
    if {"text", "label"} <= set(names):
        used, lowest = ["label", "text"], 0
    elif {"class index", "title", "description"} <= set(names):
        used, lowest = ["class index", "title", "description"], 1
    else:
        raise ValueError(
            f"{place}: {len(names)} columns that begin {' '.join(names)[:30]!r}; expected a header "
            "'text,label' or 'Class Index,Title,Description', or three columns: class 1-4, title, "
            "description"
        )
    if twice := [name for name in used if names.count(name) > 1]:
        raise ValueError(f"{place}: two columns are named {twice[0]!r}; delete one")
    numbers = {name.lower(): i for i, name in enumerate(LABELS)}
    numbers |= {str(lowest + i): i for i in range(len(LABELS))}
    at = [names.index(name) for name in used]
    examples = Examples(
        ignored=[str(h) or "(unnamed)" for i, h in enumerate(header) if i not in at]
    )
    for place, cells in [*pending, *rows]:
        if len(cells) != len(header):
            raise ValueError(f"{place}: {len(cells)} columns; the lines above have {len(header)}")
        label, *parts = (cells[i] for i in at)
        name = str(label).strip().lower()  # 1.0: pandas writes it so if a label is missing
        number = numbers.get(name[:-2] if re.fullmatch(r"\d\.0", name) else name)
        if number is None:
            raise ValueError(
                f"{place}: label {str(label)[:60]!r}; expected {lowest} to {lowest + 3} or one of "
                f"{', '.join(LABELS)}"
            )
        is_text = all(isinstance(part, str) for part in parts)  # not null, a list or bytes
        text = " ".join(part.strip() for part in parts).strip() if is_text else ""
        if not text:
            found = ", ".join(repr(part)[:40] for part in parts)
            raise ValueError(f"{place}: no text, but {found}; delete the row or fill it")
        examples.texts.append(text)
        examples.labels.append(number)
    if not examples.texts:
        raise ValueError("a header and no rows")
    return examples


def read_examples(path: Path) -> Examples:
    """A .csv, .tsv, .jsonl, .json (also .gz), .parquet or .arrow file as Examples."""
    readers = {"json": json_rows, "jsonl": json_rows, "parquet": table_rows, "arrow": table_rows}
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    try:
        return parse_rows(readers.get(kind, csv_rows)(path))
    except READ_ERRORS as error:
        raise DataError(f"{path}: {first_line(error)}") from None


def read_split(folder: Path, split: str) -> Examples:
    """`train.csv` and the like, or the Hub's `data/train-00000-of-00002.parquet`, ..."""
    shards = f"{split}-[0-9]*-of-[0-9]*.parquet"
    patterns = [*(split + suffix for suffix in FORMATS), shards, f"data/{shards}"]
    patterns += [f"*-{split}.arrow", f"*-{split}-[0-9]*-of-[0-9]*.arrow"]  # the cache of `datasets`
    files = next((found for p in patterns if (found := sorted(folder.glob(p)))), [])
    if not files:
        raise DataError(
            f"{folder} has no {split} file; expected {split}.csv ({', '.join(FORMATS[1:])}) or "
            f"data/{split}-00000-of-00001.parquet"
        )
    count = re.search(r"-of-(\d+)", files[0].name)
    if count and int(count[1]) != len(files):
        raise DataError(f"{files[0].parent} has {len(files)} {split} shards; expected {count[1]}")
    parts = [read_examples(file) for file in files]
    texts, labels = (sum((getattr(x, name) for x in parts), []) for name in ("texts", "labels"))
    return Examples(texts, labels, parts[0].ignored)


# Sources


def read_folder(folder: Path) -> tuple[Examples, Examples]:
    """(train, test) of a folder. Raises DataError unless train has all four labels of AG News."""
    if not folder.is_dir():
        raise DataError(
            f"no such folder: {folder}; --data takes auto, ag_news, sample or a folder with train "
            "and test files"
        )
    train, test = read_split(folder, "train"), read_split(folder, "test")
    if missing := [LABELS[i] for i in range(len(LABELS)) if i not in set(train.labels)]:
        raise DataError(
            f"{folder}: no training row is labelled {missing[0]}; AG News has {', '.join(LABELS)}"
        )
    return train, test


def read_hub() -> tuple[Examples, Examples]:
    """AG News from the Hugging Face cache, else from the Hub.

    Read as plain files, since `datasets` itself cannot load from a read-only cache.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # every rank would draw its own
    snapshot = partial(snapshot_download, repo_type="dataset", allow_patterns="*.parquet")
    arrow_cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    for name in (HUB_DATASET, "ag_news"):  # its old name
        folders = sorted(Path(arrow_cache, name.replace("/", "___")).glob("*/*/*"))
        with suppress(OSError):  # not cached, or not completely
            folders = [Path(snapshot(name, local_files_only=True)), *folders]
        for folder in folders:
            with suppress(DataError):  # other files, or cut short
                return read_folder(folder)
    try:
        return read_folder(Path(snapshot(HUB_DATASET)))
    except Exception as error:  # a dead network, no permission, a full disk, files cut short
        not_cached = isinstance(error, LocalEntryNotFoundError)  # what the Hub said is its cause
        cause = not_cached and error.__cause__ or error
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        if isinstance(cause, OfflineModeIsEnabled):
            reason = "the Hub did not answer, or HF_HUB_OFFLINE is set"
        raise DataError(
            f"{HUB_DATASET} is not in the Hugging Face cache and cannot be loaded from the Hub "
            f"({reason}); use --data sample, or --data FOLDER with train.csv and test.csv"
        ) from None


def read_kaggle() -> tuple[Examples, Examples, Path]:
    """(train, test, folder) of the first attached data set that reads as AG News, row by row.

    Raises DataError with what is wrong in the first of those that do not.
    """
    problems = []
    files = [file for file in KAGGLE_INPUT.rglob("train*") if file.is_file()]
    for folder in sorted({f.parent for f in files if f.stat().st_size < KAGGLE_LARGEST}):
        try:
            return *read_folder(folder), folder
        except DataError as error:  # another data set, perhaps with two or six classes
            problems.append(str(error).partition(";")[0])  # without the remedy
    problem = f" ({problems[0]})" if problems else ""
    raise DataError(f"no AG News below {KAGGLE_INPUT}{problem}")


def read_source(choice: str) -> tuple[Examples, Examples, str, str]:
    """`--data` -> (train, test, source, why). Only `auto` falls back to another source."""
    if choice == "sample":
        return *read_folder(SAMPLE), "sample", "set by --data"
    if choice == "ag_news":
        return *read_hub(), HUB_DATASET, "set by --data"
    if choice != "auto":
        return *read_folder(Path(choice)), f"folder {Path(choice).resolve().name}", "set by --data"
    if folder := os.environ.get("AG_NEWS_DIR"):
        source = f"folder {Path(folder).resolve().name}"
        try:
            return *read_folder(Path(folder)), source, "AG_NEWS_DIR is set"
        except DataError as error:
            raise DataError(f"AG_NEWS_DIR={folder}: {error}") from None
    try:
        train, test, folder = read_kaggle()
        source = f"Kaggle input {folder.relative_to(KAGGLE_INPUT)}"
        return train, test, source, f"the first below {KAGGLE_INPUT} that reads as AG News"
    except DataError as error:
        no_kaggle = error
    try:
        return *read_hub(), HUB_DATASET, "from the Hugging Face cache or Hub"
    except DataError as error:
        why = f"no AG_NEWS_DIR, {no_kaggle}, and {error}"
        return *read_folder(SAMPLE), "sample", why.partition(";")[0]  # without the remedy


# Tokens


class TokenizedExamples(Dataset):
    """Rows of token ids in one flat array; item i is (ids, label)."""

    def __init__(self, ids: np.ndarray, ends: np.ndarray, labels: np.ndarray, rows: np.ndarray):
        self.ids, self.rows = ids, rows
        self.stops = ends[rows]
        self.lengths = np.diff(ends, prepend=0)[rows]
        self.labels = labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        ids = self.ids[self.stops[i] - self.lengths[i] : self.stops[i]]
        return torch.from_numpy(ids), int(self.labels[i])


@dataclass
class Data:
    train: TokenizedExamples
    val: TokenizedExamples
    test: TokenizedExamples
    source: str
    why: str
    note: str  # what a reader of its accuracy has to know
    fingerprint: str  # of tokens, labels and the choice of rows, over all three splits
    vocab_size: int  # highest token id + 1, over all three splits


def load_tokenizer(folder: Path):
    """The tokenizer of a backbone folder. Raises DataError if it is missing or corrupted."""
    from transformers import AutoTokenizer  # here: it takes seconds, and not every rank tokenises

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise DataError(
            f"{folder} has no tokenizer.json or vocab.txt; add the tokenizer that the weights were "
            "trained with"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DataError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); copy its files again"
        ) from None


def tokenize(texts: list[str], folder: Path, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """All texts in one batched call -> (ids of all rows end to end, where each row ends)."""
    tokenizer = load_tokenizer(folder)
    with suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # a checkpoint's tokenizer has none beside it
        expected = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        if len(tokenizer) < 0.9 * expected:
            raise DataError(
                f"the tokenizer in {folder} has {len(tokenizer):,} tokens, the weights have "
                f"{expected:,}; copy its files again"
            )
    try:
        rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    except Exception as error:  # such as a vocabulary without [UNK]
        raise DataError(
            f"the tokenizer in {folder} cannot be used ({first_line(error)}); copy its files again"
        ) from None
    ends = np.cumsum([len(row) for row in rows])
    ids = np.fromiter((i for row in rows for i in row), np.int32, ends[-1])
    if (unknown := np.mean(ids == tokenizer.unk_token_id)) > MOST_UNKNOWN:
        raise DataError(
            f"{unknown:.0%} of all tokens are {tokenizer.unk_token}: the tokenizer in {folder} "
            "does not fit these texts; use the one that the backbone was trained with"
        )
    return ids, ends


def load_tokens(path: Path, rows: int) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with np.load(path) as kept:
            ids, ends = kept["ids"], kept["ends"]
        whole = ids.dtype == np.int32 and len(ends) == rows and ends[-1] == len(ids)
        return (ids, ends) if whole else None
    except Exception:  # missing, unreadable or corrupted in one of many ways: written again
        return None


def cached_tokens(texts: list[str], folder: Path, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokenize`, kept in the Hugging Face cache under a hash of everything it depends on.

    The first process takes a file lock and tokenises, the others wait for the file. A barrier would
    need the process group, and would end the run where tokenising takes longer than its time-out.
    """
    from huggingface_hub.constants import HF_HOME

    key = hashlib.sha256(json.dumps([max_length, version("tokenizers"), texts]).encode())
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            key.update(name.encode() + (folder / name).read_bytes())
    path = Path(HF_HOME) / "distrinews" / f"{key.hexdigest()[:24]}.npz"
    if tokens := load_tokens(path, len(texts)):
        return tokens
    temporary_path = path.with_suffix(f".{uuid4().hex}.tmp")  # also unique between hosts
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT):
            if tokens := load_tokens(path, len(texts)):
                return tokens
            tokens = tokenize(texts, folder, max_length)
            try:
                with open(temporary_path, "wb") as file:
                    np.savez(file, ids=tokens[0], ends=tokens[1])
                os.replace(temporary_path, path)
            finally:
                temporary_path.unlink(missing_ok=True)
    except Timeout as error:
        print(f"waited {LOCK_TIMEOUT} s for {error.lock_file}: tokenising without the cache")
    except OSError:  # a cache folder that is full or cannot be written: work without it
        pass
    return tokens or tokenize(texts, folder, max_length)


def split_validation(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows of train, rows of validation): the same 5 % of every class at any seed."""
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = [order[labels[order] == c] for c in range(len(LABELS))]
    held_out = np.concatenate([rows[: max(1, round(VALIDATION * len(rows)))] for rows in by_class])
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
    if (fewest := np.bincount(labels[:n]).min()) < 2:
        raise DataError(
            f"{source}: a class has {fewest} training row; expected at least 2, since validation "
            "takes one"
        )
    train_rows, val_rows = split_validation(labels[:n])
    # a cut is a random part, since a file may be sorted; the same part at every seed
    train_rows = np.random.default_rng(1).permutation(train_rows)[:max_train]
    val_rows = np.random.default_rng(2).permutation(val_rows)[:max_eval]
    test_rows = n + np.random.default_rng(3).permutation(len(test.labels))[:max_eval]
    ids, ends = cached_tokens(train.texts + test.texts, tokenizer_folder, max_length)
    splits = [
        TokenizedExamples(ids, ends, labels, rows) for rows in (train_rows, val_rows, test_rows)
    ]
    fingerprint = hashlib.sha256()
    for array in (ids, ends, labels, train_rows, val_rows, test_rows):
        fingerprint.update(np.ascontiguousarray(array, np.int64).tobytes())
    note = SAMPLE_NOTE if source == "sample" and choice == "auto" else ""
    if ignored := sorted({*train.ignored, *test.ignored}):
        note += f"\nignored columns: {', '.join(ignored)}"
    return Data(*splits, source, why, note, fingerprint.hexdigest()[:16], int(ids.max()) + 1)


# Batches


def collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, padded to the longest of them -> input_ids, attention_mask (batch, tokens), labels."""
    input_ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    attention_mask = torch.arange(input_ids.size(1)) < lengths[:, None]
    return input_ids.long(), attention_mask, torch.tensor([label for _, label in rows])


class LengthGroupedSampler(DistributedSampler):
    """The row numbers that one rank trains on, in an order that is the same for every world size.

    An epoch is a seeded permutation of all rows. Every 50 steps of it are sorted by length, so that
    a step holds rows of similar length and little padding, then cut into steps, and the steps are
    shuffled. Rank r takes rows r, r + W, ... of each step. Rows that do not fill a last step are
    left out of this epoch. Raises DataError if there are fewer rows than one step.
    """

    def __init__(
        self,
        dataset: TokenizedExamples,
        global_batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ):
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = len(dataset) // global_batch_size
        self.start_step = 0  # the first step to give, when an interrupted epoch resumes
        if not self.steps_per_epoch:
            raise DataError(
                f"{len(dataset)} training rows do not fill one step of {global_batch_size}; "
                f"use --global-batch-size {len(dataset)} or less"
            )

    def __len__(self) -> int:
        """Rows that this rank gets from `start_step` on."""
        steps = self.steps_per_epoch - self.start_step
        return steps * self.global_batch_size // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        # neither the rank nor the world size goes into the order: all ranks compute the same one
        rng = np.random.default_rng([self.seed, self.epoch])
        rows = rng.permutation(len(self.dataset))[: self.steps_per_epoch * self.global_batch_size]
        steps = []
        for window in np.split(rows, range(0, len(rows), WINDOW * self.global_batch_size)[1:]):
            by_length = window[np.argsort(self.dataset.lengths[window], kind="stable")]
            steps.append(rng.permutation(by_length.reshape(-1, self.global_batch_size)))
        # neighbours in length go to different ranks, so that all ranks have equally much to do
        mine = np.concatenate(steps)[self.start_step :, self.rank :: self.num_replicas]
        yield from mine.ravel().tolist()


def eval_loader(data: TokenizedExamples, batch_size: int, rank=0, world_size=1) -> DataLoader:
    """Every row on exactly one rank, none repeated; ranks may hold different counts."""
    mine = np.argsort(data.lengths, kind="stable")[rank::world_size].tolist()
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return DataLoader(data, batch_sampler=batches, collate_fn=collate)
