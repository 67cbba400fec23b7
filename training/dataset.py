"""AG News as token ids: tokenised once, split, and dealt to the ranks in batches."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

VALIDATION = 0.05  # of train, from every class alike
WINDOW = 50  # steps whose rows are sorted by length together
MOST_UNKNOWN = 0.1  # share of all tokens; a cased tokenizer on an uncased vocabulary has 0.2
MANY_CAPITALS = 0.01  # share of the tokens that begin with one; an uncased vocabulary has none
LOCK_TIMEOUT = 600  # seconds to wait while another process tokenises


class DataError(Exception):
    """Rows or a tokenizer that cannot be trained with; the message is one line, with the remedy."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Tokens


class TokenizedExamples(Dataset):
    """Item i is (ids, label) of rows[i]; `ids` holds all rows' tokens, row r's before ends[r]."""

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
    tokenizer_digest: str  # of its files
    vocab_size: int  # highest token id + 1, over all three splits


def load_tokenizer(folder: Path):
    """The tokenizer of a backbone folder. Raises DataError if it is missing or corrupted."""
    from transformers import AutoTokenizer  # here: it takes seconds, and not every rank tokenises

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise DataError(
            f"{folder} has no tokenizer.json or vocab.txt; add the tokenizer that the weights were "
            "trained with"
        )
    config = folder / "tokenizer_config.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        told = config.exists() and "do_lower_case" in config.read_text(encoding="utf-8")
        capitals = sum(token[:1].isupper() for token in tokenizer.get_vocab())
        if not told and capitals > MANY_CAPITALS * len(tokenizer):
            # transformers would lower-case all texts, whatever tokenizer.json says
            tokenizer = AutoTokenizer.from_pretrained(folder, do_lower_case=False)
        tokenizer.truncation_side = "right"  # as the server cuts
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DataError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); copy its files again"
        ) from None


def tokenize(texts: list[str], folder: Path, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """All texts in one batched call -> (ids of all rows end to end, where each row ends)."""
    tokenizer = load_tokenizer(folder)
    # a checkpoint's tokenizer has no config.json beside it
    with suppress(OSError, ValueError, KeyError, TypeError):
        expected = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        if not 0.99 * expected <= len(tokenizer) <= expected:  # weights may be padded by a few rows
            raise DataError(
                f"the tokenizer in {folder} has {len(tokenizer):,} tokens, the weights have "
                f"{expected:,}; copy its files again"
            )
    try:
        special = tokenizer("")["input_ids"]
        rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    except Exception as error:  # such as a vocabulary without [UNK]
        raise DataError(
            f"the tokenizer in {folder} cannot be used ({first_line(error)}); copy its files again"
        ) from None
    if special != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
        raise DataError(
            f"the tokenizer in {folder} does not put [CLS] before a text and [SEP] behind it; add "
            "the post_processor to its tokenizer.json"
        )
    ends = np.cumsum([len(row) for row in rows])
    ids = np.fromiter((i for row in rows for i in row), np.int32, ends[-1])
    if (unknown := np.mean(ids == tokenizer.unk_token_id)) > MOST_UNKNOWN:
        raise DataError(
            f"{unknown:.0%} of all tokens are {tokenizer.unk_token}: the tokenizer in {folder} "
            "does not fit these texts; use the one that the backbone was trained with"
        )
    return ids, ends


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over all files that decide how `folder`'s tokenizer works."""
    digest = hashlib.sha256()
    names = "tokenizer.json vocab.txt tokenizer_config.json special_tokens_map.json config.json"
    for name in (*names.split(), "added_tokens.json"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


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

    versions = [version("tokenizers"), version("transformers"), tokenizer_digest(folder)]
    key = hashlib.sha256(json.dumps([max_length, versions, texts]).encode())
    path = Path(HF_HOME) / "distrinews" / f"{key.hexdigest()[:24]}.npz"
    if tokens := load_tokens(path, len(texts)):  # also where the folder cannot be written
        return tokens
    temporary_path = path.with_suffix(f".{uuid4().hex}.tmp")  # also unique between hosts
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT):
            tokens = load_tokens(path, len(texts))  # what another process wrote meanwhile
            if tokens is None:
                tokens = tokenize(texts, folder, max_length)
                with open(temporary_path, "wb") as file:
                    np.savez(file, ids=tokens[0], ends=tokens[1])
                os.replace(temporary_path, path)
    except Timeout as error:
        print(f"waited {LOCK_TIMEOUT} s for {error.lock_file}: tokenising without the cache")
    except OSError:  # a cache folder that is full or cannot be written: work without it
        pass
    finally:
        with suppress(OSError):
            temporary_path.unlink(missing_ok=True)
    return tokens or tokenize(texts, folder, max_length)


def split_validation(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows of train, rows of validation): the same 5 % of every class at any seed."""
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = [order[labels[order] == c] for c in np.unique(labels)]
    held_out = np.concatenate([rows[: max(1, round(VALIDATION * len(rows)))] for rows in by_class])
    return np.setdiff1d(order, held_out), np.sort(held_out)


def prepare_data(
    source, tokenizer_folder: Path, max_length: int, max_train: int | None, max_eval: int | None
) -> Data:
    """Splits, cuts and tokenises `source`, which is what ag_news.find_data returns.

    Every rank may call it at once: one process of a host works, the others wait.
    """
    train, test = source.train, source.test
    labels, n = np.array(train.labels + test.labels), len(train.labels)
    if (fewest := np.bincount(labels[:n]).min()) < 2:
        raise DataError(
            f"{source.name}: a class has {fewest} training row; expected at least 2, since "
            "validation takes one"
        )
    train_rows, val_rows = split_validation(labels[:n])
    # --max-*-samples take a random part, since a file may be sorted: the same one at every seed
    train_rows = np.random.default_rng(1).permutation(train_rows)[:max_train]
    val_rows = np.random.default_rng(2).permutation(val_rows)[:max_eval]
    test_rows = n + np.random.default_rng(3).permutation(len(test.labels))[:max_eval]
    ids, ends = cached_tokens(train.texts + test.texts, tokenizer_folder, max_length)
    split_rows = (train_rows, val_rows, test_rows)
    splits = [TokenizedExamples(ids, ends, labels, rows) for rows in split_rows]
    fingerprint = hashlib.sha256()
    for array in (ids, ends, labels, *split_rows):
        fingerprint.update(np.ascontiguousarray(array, np.int64).tobytes())
    note = source.note
    if ignored := sorted({*train.ignored, *test.ignored}):
        note += f"\nignored columns: {', '.join(ignored)}"
    known = set(train.texts)
    if same := sum(text in known for text in test.texts):
        note += f"\n{same:,} of {len(test.texts):,} test rows are training rows as well: "
        note += "the test accuracy is too high"
    vocab_size = int(ids.max()) + 1
    digests = fingerprint.hexdigest()[:16], tokenizer_digest(tokenizer_folder)
    return Data(*splits, source.name, source.why, note, *digests, vocab_size)


# Batches


def collate(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and attention_mask, (batch, tokens) padded to the longest row, and labels."""
    rows, labels = zip(*batch, strict=True)
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    attention_mask = torch.arange(input_ids.size(1)) < lengths[:, None]
    return input_ids.long(), attention_mask, torch.tensor(labels)


class LengthGroupedSampler(DistributedSampler):
    """The row numbers that one rank trains on, in an order that is the same for every world size.

    An epoch is a seeded permutation of all rows. Every 50 steps of it are sorted by length, so that
    a step holds rows of similar length and little padding, then cut into steps, and the steps are
    shuffled. Rank r takes rows r, r + W, ... of each step. Rows that do not fill a last step are
    left out of this epoch. Raises DataError if there are fewer rows than one step.
    """

    def __init__(
        self, dataset: TokenizedExamples, global_batch_size: int, num_replicas=1, rank=0, seed=0
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
        # neighbours in length go to different ranks, so all ranks get about as many tokens
        mine = np.concatenate(steps)[self.start_step :, self.rank :: self.num_replicas]
        yield from mine.ravel().tolist()


def eval_loader(data: TokenizedExamples, batch_size: int, rank=0, world_size=1) -> DataLoader:
    """Every row on exactly one rank, none repeated; ranks may hold different counts."""
    mine = np.argsort(data.lengths, kind="stable")[rank::world_size].tolist()
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return DataLoader(data, batch_sampler=batches, collate_fn=collate)
