"""AG News: the places it can come from, and how its files are read and checked.

A reader of a file yields (place in the file, cells), first of all the column names. It raises
ValueError for what it cannot read; `read_examples` adds the file's name.
"""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

csv.field_size_limit(2**31 - 1)  # characters of a cell; its default is 131,072
LABELS = ("World", "Sports", "Business", "Sci/Tech")  # label 0 to 3, in AG News's own order
HUB_DATASET = "fancyzhx/ag_news"
SIZES = (120_000, 7_600)  # rows of train and test
KAGGLE_INPUT = Path("/kaggle/input")
KAGGLE_LARGEST = 1_000_000_000  # bytes; AG News has 30 million, larger files are not looked at
SAMPLE = Path(__file__).parent / "sample_data"
# in order of preference
FORMATS = ".csv .csv.gz .tsv .tsv.gz .jsonl .jsonl.gz .json .json.gz .parquet".split()
# the columns that are used, the label first -> the lowest label
FORMS = {("label", "text"): 0, ("class index", "title", "description"): 1}
SAMPLE_NOTE = """
+--------------------------------------------------------------------------+
| This is the bundled sample: 600 short items written for this repository. |
| An accuracy on it is not an AG News figure. For AG News itself, set      |
| AG_NEWS_DIR, pass --data FOLDER, or run where the Hub can be reached.    |
+--------------------------------------------------------------------------+"""


class SourceError(Exception):
    """Missing or malformed data; the message is one line and names file, line and remedy."""


@dataclass
class Examples:
    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # columns that were not used


class Source(NamedTuple):
    train: Examples
    test: Examples
    name: str
    why: str
    note: str = ""  # what a reader of its accuracy has to know


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Files


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
            if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                raise csv.Error("a quotation mark opens a cell that ends lines later: write two")
            if cells:
                yield f"line {line}", cells
            line = reader.line_num + 1  # a quoted cell may span several lines
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from None


def json_rows(path: Path) -> Iterator[tuple[str, list]]:
    """JSON lines, or one array of objects as pandas writes it with orient="records"."""
    text, header, kind = read_text(path), None, "line"
    lines = enumerate(text.split("\n"), 1)
    if text.lstrip().startswith("["):
        lines, kind = enumerate(map(json.dumps, json.loads(text)), 1), "row"
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"found a JSON {type(row).__name__}")
            json.dumps(row, ensure_ascii=False).encode()  # fails on half a surrogate pair
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{kind} {number}: expected a JSON object per {kind}; {error}"
            ) from None
        if header is None:
            header = list(row)
            yield f"{kind} {number}", header
        yield f"{kind} {number}", [row.get(name) for name in header]


def table_rows(path: Path) -> Iterator[tuple[str, list]]:
    """Parquet, or the Arrow file that `datasets` caches. A ClassLabel is given by its name."""
    import pyarrow.parquet

    if path.suffix == ".parquet":  # as a file: read_table adds columns for folders named key=value
        table = pyarrow.parquet.ParquetFile(path).read()
    else:
        table = pyarrow.ipc.open_stream(path.read_bytes()).read_all()
    table.validate(full=True)  # corrupted bytes could crash the process below
    info = json.loads((table.schema.metadata or {}).get(b"huggingface", "{}"))
    features = (info.get("info") or {}).get("features") or {}
    yield "header", table.column_names
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        used = any(name.strip().lower() in form for form in FORMS)
        values = column.to_pylist() if used else [None] * len(column)  # Python lacks some types
        if used and (names := (features.get(name) or {}).get("names")):
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
    names, first_row = [str(cell).strip().lower() for cell in header], []
    if len(names) == 3 and names[0] in {"1", "2", "3", "4"}:
        names, first_row = ["class index", "title", "description"], [(place, header)]
    form = next((form for form in FORMS if {*form} <= {*names}), None)
    if form is None:
        raise ValueError(
            f"{place}: {len(names)} columns that begin {' '.join(names)[:30]!r}; expected a header "
            "'text,label' or 'Class Index,Title,Description', or three columns: class 1-4, title, "
            "description"
        )
    if twice := [name for name in form if names.count(name) > 1]:
        raise ValueError(f"{place}: two columns are named {twice[0]!r}; delete one")
    columns, lowest = [names.index(name) for name in form], FORMS[form]
    numbers = {}
    for i, name in enumerate(LABELS):  # pandas writes 1 as 1.0 where another label is missing
        numbers |= dict.fromkeys((name.lower(), f"{lowest + i}", f"{lowest + i}.0"), i)
    ignored = [str(name) or "(unnamed)" for i, name in enumerate(header) if i not in columns]
    examples = Examples(ignored=ignored)
    for place, cells in [*first_row, *rows]:
        if len(cells) != len(header):
            raise ValueError(f"{place}: {len(cells)} columns; the lines above have {len(header)}")
        label, *parts = (cells[i] for i in columns)
        number = numbers.get(str(label).strip().lower())
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
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError("a Git LFS pointer; git lfs pull gets the data")
        return parse_rows(readers.get(kind, csv_rows)(path))
    except Exception as error:  # zlib and pyarrow raise many kinds for a corrupted file
        raise SourceError(f"{path}: {first_line(error)}") from None


def split_files(folder: Path, split: str) -> list[list[Path]]:
    """The files of a split in each layout: `train.csv` and the like, or the Hub's
    `data/train-00000-of-00002.parquet`, ...; most lists are empty."""
    shards = f"{split}-[0-9]*-of-[0-9]*.parquet"
    places = ("", "data/", f"{split}/")
    patterns = [place + split + suffix for place in places for suffix in FORMATS]
    patterns += [shards, f"data/{shards}"]
    patterns += [f"*-{split}.arrow", f"*-{split}-[0-9]*-of-[0-9]*.arrow"]  # the cache of `datasets`
    patterns += [f"{split}/data-[0-9]*-of-[0-9]*.arrow"]  # its save_to_disk
    # the Hub's branch refs/convert/parquet
    patterns += [f"{split}/[0-9]*.parquet", f"default/{split}/[0-9]*.parquet"]
    return [sorted(folder.glob(pattern)) for pattern in patterns]


def read_split(folder: Path, split: str, files: list[Path]) -> Examples:
    if not files:
        raise SourceError(
            f"{folder} has no {split} file; expected {split}.csv ({', '.join(FORMATS[1:])}) or "
            f"data/{split}-00000-of-00001.parquet"
        )
    count = re.search(r"-of-(\d+)", files[0].name)
    if all(file.stem.isdigit() for file in files):  # they do not say how many they are
        files.sort(key=lambda file: int(file.stem))
        if int(files[-1].stem) + 1 != len(files):
            raise SourceError(f"{files[0].parent}: a file before {files[-1].name} is missing")
    if count and int(count[1]) != len(files):
        raise SourceError(f"{files[0].parent} has {len(files)} {split} shards; expected {count[1]}")
    examples, *more = map(read_examples, files)
    for shard in more:
        examples.texts += shard.texts
        examples.labels += shard.labels
    return examples


def read_folder(folder: Path) -> tuple[Examples, Examples]:
    """(train, test) of a folder. Raises SourceError unless train has all four labels of AG News."""
    if not folder.is_dir():
        raise SourceError(
            f"no such folder: {folder}; --data takes auto, ag_news, sample or a folder with train "
            "and test files"
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise SourceError(f"{folder}: permission denied")
    layouts = list(zip(*(split_files(folder, split) for split in ("train", "test")), strict=True))
    together = next(filter(all, layouts), None)  # else the first file of each
    files = together or [next(filter(None, column), []) for column in zip(*layouts, strict=True)]
    train, test = map(partial(read_split, folder), ("train", "test"), files)
    if missing := [name for i, name in enumerate(LABELS) if i not in train.labels]:
        raise SourceError(
            f"{folder}: no training row is labelled {missing[0]}; AG News has {', '.join(LABELS)}"
        )
    return train, test


# Places


def read_hub() -> tuple[Examples, Examples]:
    """(train, test) from the Hugging Face cache, else from the Hub.

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
            with suppress(SourceError):  # other files, or cut short
                train, test = read_folder(folder)
                # load_dataset("/my/own/ag_news") is cached under the old name, too
                is_it = (len(train.texts), len(test.texts)) == SIZES
                if is_it or "ag_news" not in folder.parts:
                    return train, test
    try:
        return read_folder(Path(snapshot(HUB_DATASET)))
    except Exception as error:  # a dead network, no permission, a full disk, files cut short
        not_cached = isinstance(error, LocalEntryNotFoundError)
        cause = (not_cached and error.__cause__) or error  # its cause is what the Hub said
        reason = f"{type(cause).__name__}: {first_line(cause)}"
        if isinstance(cause, OfflineModeIsEnabled):
            reason = "the Hub did not answer, or HF_HUB_OFFLINE is set"
        raise SourceError(
            f"{HUB_DATASET} is not in the Hugging Face cache and cannot be loaded from the Hub "
            f"({reason}); use --data sample, or --data FOLDER with train.csv and test.csv"
        ) from None


def read_kaggle() -> Source:
    """The attached data set that has AG News's rows, else the first that reads as AG News.

    Raises SourceError with what is wrong in the first of those that do not.
    """
    why, found, problems = f"the first below {KAGGLE_INPUT} that reads as AG News", [], []
    files = [file for file in KAGGLE_INPUT.rglob("train*") if file.is_file()]
    folders = {file.parent for file in files if file.stat().st_size < KAGGLE_LARGEST}
    for path in KAGGLE_INPUT.rglob("train"):  # a folder of files
        if path.is_dir() and sum(f.stat().st_size for f in path.glob("*.*")) < KAGGLE_LARGEST:
            folders.add(path.parent)
    for folder in sorted(folders):
        name = f"Kaggle input {folder.relative_to(KAGGLE_INPUT)}"
        try:
            train, test = read_folder(folder)
        except SourceError as error:  # another data set, perhaps with two or six classes
            problems.append(str(error).partition(";")[0])  # without the remedy
            continue
        found.append(Source(train, test, name, why))
        if (len(train.texts), len(test.texts)) == SIZES:  # other sets may have four classes, too
            return found[-1]._replace(why="it has as many rows as AG News")
    if found:
        return found[0]
    problem = f" ({problems[0]})" if problems else ""
    raise SourceError(f"no AG News below {KAGGLE_INPUT}{problem}")


def find_data(choice: str) -> Source:
    """What `--data` chose. Only `auto` falls back to another source."""
    if choice in ("ag_news", "sample") and Path(choice).is_dir():
        raise SourceError(f"--data {choice}: a source's name, and a folder here; --data ./{choice}")
    if choice == "sample":
        return Source(*read_folder(SAMPLE), "sample", "set by --data")
    if choice == "ag_news":
        return Source(*read_hub(), HUB_DATASET, "set by --data")
    if choice != "auto":
        name = f"folder {Path(choice).resolve().name}"
        return Source(*read_folder(Path(choice)), name, "set by --data")
    if folder := os.environ.get("AG_NEWS_DIR"):
        name = f"folder {Path(folder).resolve().name}"
        try:
            return Source(*read_folder(Path(folder)), name, "AG_NEWS_DIR is set")
        except SourceError as error:
            raise SourceError(f"AG_NEWS_DIR={folder}: {error}") from None
    try:
        return read_kaggle()
    except SourceError as error:
        no_kaggle = error
    try:
        return Source(*read_hub(), HUB_DATASET, "from the Hugging Face cache or Hub")
    except SourceError as error:
        why = f"no AG_NEWS_DIR, {no_kaggle}, and {error}".partition(";")[0]  # without the remedy
        return Source(*read_folder(SAMPLE), "sample", why, SAMPLE_NOTE)
