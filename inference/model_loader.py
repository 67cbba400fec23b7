"""The checkpoint that training left, behind one of two engines: torch, exact, or int8 (OpenVINO).

python -m inference.model_loader "Shares rose after the bank raised its forecast"

Settings: CHECKPOINT_DIR, and THREADS or OMP_NUM_THREADS for the threads that the model uses. The
int8 engine imports neither torch nor transformers; inference/export.py writes its three files.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from mmap import ACCESS_COPY, MADV_DONTNEED, mmap
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer

from training.machine import cores

ENGINES = ("auto", "torch", "int8")
CHECKPOINTS = Path(os.environ.get("CHECKPOINT_DIR") or Path(__file__).parent.parent / "checkpoints")
CHECKPOINTS = CHECKPOINTS.expanduser()  # no shell expands the ~ of `docker run -e` or an .env file
CHECKPOINT = "distilbert_agnews.pt"
TOKENIZER = "tokenizer/tokenizer.json"
INT8_XML, INT8_BIN = "distilbert_agnews.int8.xml", "distilbert_agnews.int8.bin"
INT8_METADATA = "distilbert_agnews.int8.json"  # hashes, labels, and how good int8 is
INT8_FILES = (INT8_XML, INT8_BIN, INT8_METADATA)
# a key of the metadata -> the file whose SHA-256 it is
HASHES = {"xml_sha256": INT8_XML, "bin_sha256": INT8_BIN, "tokenizer_sha256": TOKENIZER}
REMEDY = "train one first: make demo, or bash training/run_ddp.sh"
EXPORT = "python inference/export.py --to int8"


class LoadError(Exception):
    """A model that cannot be served; the message is one line and names the remedy."""


class NoInt8Error(LoadError):
    """There is no int8 model of this checkpoint, so `auto` takes torch."""


@dataclass(frozen=True)
class Engine:
    """`logits(input_ids, attention_mask)`: int64 (rows, tokens) -> float32 (rows, classes)."""

    logits: Callable[[np.ndarray, np.ndarray], np.ndarray]
    labels: list[str]
    max_length: int
    vocab_size: int
    info: dict  # backbone, data, engine, device, test_accuracy, checkpoint


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    truncated: bool


def sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None


def read_count(name: str) -> int | None:
    """A positive number from the environment; None if it is not set."""
    value = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP takes one per nesting level
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 1024):
        raise LoadError(f"{name}={value}: expected a whole number from 1 to 1024")
    return int(value)


def workers() -> int:
    """Server processes that share the cores: --workers of uvicorn or gunicorn, or what they read
    from the environment instead.

    Neither server tells its workers how many they are, but they all see its command line. Where the
    number is set elsewhere, as in gunicorn.conf.py, THREADS has to be set, too.
    """
    arguments, names = [], ("WEB_CONCURRENCY",)
    if "gunicorn" in sys.argv[0]:
        arguments = shlex.split(os.environ.get("GUNICORN_CMD_ARGS", "")) + sys.argv[1:]
    elif "uvicorn" in sys.argv[0]:
        arguments, names = sys.argv[1:], ("UVICORN_WORKERS", "WEB_CONCURRENCY")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-w", "--workers", type=int)
    count = parser.parse_known_args(arguments)[0].workers
    return count or next(filter(None, map(read_count, names)), 1)


def threads() -> int:
    """Threads of one forward pass: as set, or this worker's share of the cores."""
    count = read_count("THREADS") or read_count("OMP_NUM_THREADS")
    return count or max(1, cores() // max(1, workers()))


def load_model(folder: Path) -> tuple:
    """(the trained model on the CPU, all of its checkpoint); LoadError if they do not fit."""
    path, tokenizer = folder / CHECKPOINT, folder / TOKENIZER
    try:
        from training.checkpoint import CheckpointError, load_checkpoint
        from training.model import Config, NewsClassifier
    except ImportError:
        raise LoadError(f"no usable {INT8_XML} in {folder}, and no torch to run {path}") from None

    keys = ("model", "config", "labels", "max_length", "metrics", "provenance", "tokenizer_sha256")
    try:
        state = load_checkpoint(path, keys)
        model = NewsClassifier(Config(**state["config"])).eval()
        model.load_state_dict(state["model"])
    except CheckpointError as error:
        raise LoadError(f"{error}: make demo, or bash training/run_ddp.sh") from None
    except (TypeError, ValueError, RuntimeError, AttributeError):
        raise LoadError(f"the weights in {path} do not fit its config; {REMEDY}") from None
    classes, labels = model.config.num_labels, state["labels"]
    if classes != len(labels):
        raise LoadError(f"{path} has {classes} classes and {len(labels)} labels; {REMEDY}")
    if not all(value.isfinite().all() for value in model.parameters()):
        raise LoadError(f"{path} holds weights that are not finite; {REMEDY}")
    if os.path.exists(tokenizer) and sha256(tokenizer) != state["tokenizer_sha256"]:
        raise LoadError(f"{tokenizer} is not the one that {path} was trained with; {REMEDY}")
    return model, state


def torch_engine(folder: Path) -> Engine:
    """Rank 0's checkpoint in fp32, on a GPU if there is one."""
    # oneDNN would keep torch's CPU kernels for 1,024 shapes, and memory grow until batches of as
    # many sizes and lengths have been seen; tests/faults/serve.py watches it
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    model, state = load_model(folder)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    torch.set_num_threads(threads())

    @torch.inference_mode()
    def logits(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        inputs = [torch.from_numpy(array).to(device) for array in (input_ids, attention_mask)]
        return model(*inputs).float().cpu().numpy()

    info = {
        "backbone": state["provenance"]["model"],
        "data": state["provenance"]["data"],
        "engine": "torch",
        "device": device.type,
        "test_accuracy": state["metrics"]["test_accuracy"],
        "checkpoint": sha256(folder / CHECKPOINT)[:12],
    }
    return Engine(logits, state["labels"], state["max_length"], model.config.vocab_size, info)


def metadata_sha256(metadata: dict) -> str:
    rest = {key: value for key, value in metadata.items() if key != "metadata_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_metadata(folder: Path) -> dict:
    """What export.py noted about the int8 model, once the files beside it are the ones it names.

    Raises NoInt8Error if there is no int8 model of this checkpoint, LoadError if it is corrupted.
    """
    path, again = folder / INT8_METADATA, f"export it again: {EXPORT}"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if metadata["metadata_sha256"] != metadata_sha256(metadata):
            raise ValueError  # a wrong label or length in it would be served
    except (OSError, ValueError, LookupError, TypeError):
        raise NoInt8Error(f"no usable {INT8_METADATA} in {folder}; {again}") from None
    checkpoint = folder / CHECKPOINT  # not there in an image
    if os.path.exists(checkpoint) and sha256(checkpoint) != metadata["checkpoint_sha256"]:
        raise NoInt8Error(f"{path} was made of another checkpoint than {CHECKPOINT}; {again}")
    for key, name in HASHES.items():
        try:
            found = sha256(folder / name)
        except LoadError as error:
            kind = NoInt8Error if name in INT8_FILES else LoadError
            raise kind(f"{error}; {again}") from None
        if found != metadata[key]:
            raise LoadError(
                f"{folder / name} is corrupted or not the one of {INT8_METADATA}; {again}"
            )
    return metadata


def import_openvino():
    """`import openvino`, without its telemetry, which would report each import to Google Analytics.

    Where its telemetry package cannot be imported, OpenVINO (and NNCF) use an empty one instead.
    """
    sys.modules["openvino_telemetry"] = None
    try:
        import openvino
    except ImportError:
        raise NoInt8Error(f"{INT8_XML} needs openvino: pip install openvino") from None
    return openvino


def private_copy(path: Path) -> BinaryIO:
    """A copy without a name, open: the model is read from it while it is served, and `cp` over the
    file would change it, or end the server. It takes the file's size of disk once more for each
    worker; where there is no place for it the file itself is taken."""
    try:
        copy = tempfile.TemporaryFile(dir=path.parent)
        with open(path, "rb") as file:
            shutil.copyfileobj(file, copy, 2**20)
        copy.flush()
    except OSError:  # a folder that cannot be written (nor the file in it), or a full disk
        return open(path, "rb")
    return copy


def int8_engine(folder: Path) -> Engine:
    """The int8 model that export.py made of the checkpoint, on the CPU."""
    openvino, metadata = import_openvino(), read_metadata(folder)
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        # M_ARENA_MAX: all threads share a heap; each one's own would hold freed activations
        ctypes.CDLL(None).mallopt(-8, 1)
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads(),
        # pinned threads of several workers would share the same cores
        "ENABLE_CPU_PINNING": False,
        # not bf16 where a CPU has it: scores would depend on the machine, and more on the batch
        "INFERENCE_PRECISION_HINT": "f32",
        # kernels are cached by shape: enough for usual ones; 5,000, the default, fills the memory
        "CPU_RUNTIME_CACHE_CAPACITY": 128,
    }
    core, lock = openvino.Core(), Lock()
    try:
        with private_copy(folder / INT8_BIN) as file:
            weights = mmap(file.fileno(), 0, access=ACCESS_COPY)
        tensor = openvino.Tensor(np.frombuffer(weights, np.uint8), shared_memory=True)
        model = core.read_model((folder / INT8_XML).read_bytes(), tensor)
        request = core.compile_model(model, "CPU", options).create_infer_request()
    except (RuntimeError, ValueError):  # ValueError: an empty file
        raise LoadError(f"OpenVINO cannot run {folder / INT8_XML}; {EXPORT}") from None

    def logits(input_ids: np.ndarray, attention_mask: np.ndarray, tensor=tensor) -> np.ndarray:
        # a new shape costs far more than a known one, and memory for its kernels; so lengths are
        # multiples of 16 here, and batches powers of two in batcher.py
        length = input_ids.shape[1]
        width = min(length + -length % 16, max(length, metadata["max_length"]))
        padding = ((0, 0), (0, width - length))
        input_ids, attention_mask = np.pad(input_ids, padding), np.pad(attention_mask, padding)
        with lock:  # a request runs one batch at a time
            return request.infer({"input_ids": input_ids, "attention_mask": attention_mask})[0]

    one = np.ones((1, 2), np.int64)
    logits(one, one)
    # OpenVINO has copied the matrices; only the embeddings are still read from the file, so its
    # pages may leave the memory until they are needed
    weights.madvise(MADV_DONTNEED)
    info = metadata["info"] | {"engine": "int8", "device": "cpu"}
    return Engine(logits, metadata["labels"], metadata["max_length"], metadata["vocab_size"], info)


def stamps(folder: Path) -> dict:
    """What changes when one of the model's files is replaced."""
    paths = [folder / name for name in (CHECKPOINT, TOKENIZER, *INT8_FILES)]
    stats = {path: path.stat() for path in paths if os.path.exists(path)}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def load_engine(folder: Path, choice: str) -> Engine:
    """`auto`: int8 if there is an int8 model of this checkpoint, else torch."""
    if choice not in ENGINES:
        raise LoadError(f"ENGINE={choice}: expected {', '.join(ENGINES)}")
    if choice == "torch":
        return torch_engine(folder)
    try:
        return int8_engine(folder)
    except NoInt8Error as error:
        if choice == "int8":
            raise
        if os.path.exists(folder / INT8_METADATA):
            print(f"warning: {error}; serving with torch", file=sys.stderr, flush=True)
        return torch_engine(folder)


class Classifier:
    """A trained model with its tokenizer: texts to tokens, and tokens to the scores of labels."""

    def __init__(self, folder: Path = CHECKPOINTS, engine: str = "auto"):
        before = stamps(folder)
        self.engine = load_engine(folder, engine)
        self.labels, self.info = self.engine.labels, self.engine.info
        path = folder / TOKENIZER
        try:
            self.tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # missing, or tokenizers' own bare Exception
            problem = "no tokenizer at" if isinstance(error, OSError) else "corrupted:"
            raise LoadError(f"{problem} {path}; {REMEDY}") from None
        if stamps(folder) != before:
            raise LoadError(f"{folder} changed while the model was read; start again")
        if (size := self.tokenizer.get_vocab_size()) > self.engine.vocab_size:
            raise LoadError(
                f"{path} has {size} tokens, the model {self.engine.vocab_size}; {REMEDY}"
            )
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()  # done in encode(), which tells the client
        self.end = self.tokenizer.encode("").ids[-1]  # [SEP]
        vocabulary = self.tokenizer.get_vocab().items()
        self.not_words = {i for token, i in vocabulary if not re.search(r"[^\W_]", token)}
        self.not_words.add(self.tokenizer.token_to_id("[UNK]"))
        self.scores([self.encode("warm up").ids])

    def encode(self, text: str) -> Encoded:
        """The ids that training would see, cut to the same length as there."""
        # not encode(text): that keeps Python's lock, and stops the event loop where words are long
        [encoding] = self.tokenizer.encode_batch_fast([text])
        ids, limit = encoding.ids, self.engine.max_length
        if len(ids) <= limit:
            return Encoded(ids, False)
        return Encoded([*ids[: limit - 1], self.end], True)

    def scores(self, rows: list[list[int]]) -> np.ndarray:
        """Token ids, padded to the longest row -> softmax probabilities, (rows, classes)."""
        input_ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = row
        lengths = np.array([len(row) for row in rows])
        attention_mask = np.arange(input_ids.shape[1]) < lengths[:, None]
        logits = self.engine.logits(input_ids, attention_mask.astype(np.int64))
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def answer(self, encoded: Encoded, scores: np.ndarray) -> dict:
        best = int(scores.argmax())
        return {
            "label": self.labels[best],
            "confidence": float(scores[best]),
            "scores": dict(zip(self.labels, map(float, scores), strict=True)),
            "truncated": encoded.truncated,
            "out_of_vocabulary": self.not_words.issuperset(encoded.ids[1:-1]),
        }

    def predict(self, texts: list[str]) -> list[dict]:
        """One batch, without a server: what POST /predict answers, for each text."""
        encoded = [self.encode(text) for text in texts]
        scores = self.scores([row.ids for row in encoded])
        return [self.answer(*pair) for pair in zip(encoded, scores, strict=True)]


if __name__ == "__main__":
    if not all(map(str.strip, sys.argv[1:] or [""])):
        sys.exit('error: no text; python -m inference.model_loader "Shares rose"')
    texts = [text.encode("utf-8", "replace").decode() for text in sys.argv[1:]]
    try:
        print(json.dumps(Classifier().predict(texts)))
    except LoadError as error:
        sys.exit(f"error: {error}")
