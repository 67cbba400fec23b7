"""The checkpoint that training left, behind one of two engines: torch, exact, or int8 under ONNX.

python -m inference.model_loader "Shares rose after the bank raised its forecast"

With the onnx engine neither torch nor transformers is imported: the server starts sooner, and an
image needs no torch at all. inference/export.py writes its two files beside the checkpoint.
"""

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
CHECKPOINT = "distilbert_agnews.pt"
ONNX = "distilbert_agnews.int8.onnx"
ONNX_FACTS = "distilbert_agnews.int8.json"  # what belongs to the file and cannot stand in it
REMEDY = "train one first: make demo, or bash training/run_ddp.sh"


class LoadError(Exception):
    """A checkpoint that cannot be served; the message is one line and names the remedy."""


@dataclass(frozen=True)
class Engine:
    """`logits(input_ids, attention_mask)`: int64 (rows, tokens) -> float32 (rows, classes)."""

    logits: Callable[[np.ndarray, np.ndarray], np.ndarray]
    labels: list[str]
    max_length: int
    info: dict  # backbone, data, engine, device, test_accuracy, checkpoint


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    truncated: bool


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def threads() -> int:
    """Cores that this process may use; a container's share can be smaller than the machine."""
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:  # `docker run --cpus 2` hides no core, it sets a quota: "200000 100000" microseconds
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    except (OSError, ValueError):  # no cgroup of version 2, or "max"
        return able
    return max(1, min(able, quota // period))


def torch_engine(folder: Path) -> Engine:
    """Rank 0's checkpoint in fp32, on a GPU if there is one."""
    path = folder / CHECKPOINT
    if importlib.util.find_spec("torch") is None:
        raise LoadError(f"no usable {ONNX} in {folder}, and {CHECKPOINT} needs torch; {REMEDY}")
    # oneDNN would keep torch's CPU kernels for 1,024 shapes, and memory grow until batches of as
    # many sizes and lengths have been seen; tests/faults/serve.py watches it
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    import torch

    from training.checkpoint import CheckpointError, load_checkpoint
    from training.model import Config, NewsClassifier

    keys = ("model", "config", "labels", "max_length", "metrics", "provenance", "tokenizer_sha256")
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    try:
        state = load_checkpoint(path, keys)
        model = NewsClassifier(Config(**state["config"])).eval()
        model.load_state_dict(state["model"])
    except CheckpointError as error:
        raise LoadError(f"{error}: make demo, or bash training/run_ddp.sh") from None
    except (TypeError, ValueError, RuntimeError, AttributeError):
        raise LoadError(f"the weights in {path} do not fit its config; {REMEDY}") from None
    if model.config.num_labels != len(state["labels"]):
        raise LoadError(
            f"{path} has {model.config.num_labels} classes and {len(state['labels'])} labels; "
            f"{REMEDY}"
        )
    if not all(value.isfinite().all() for value in model.parameters()):
        raise LoadError(f"{path} holds weights that are not finite; {REMEDY}")
    if tokenizer.exists() and sha256(tokenizer) != state["tokenizer_sha256"]:
        raise LoadError(f"{tokenizer} is not the one that {path} was trained with; {REMEDY}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    torch.set_num_threads(threads())

    @torch.inference_mode()
    def logits(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        put = [torch.from_numpy(array).to(device) for array in (input_ids, attention_mask)]
        return model(*put).float().cpu().numpy()

    info = {
        "backbone": state["provenance"]["model"], "data": state["provenance"]["data"],
        "engine": "torch", "device": device.type,
        "test_accuracy": state["metrics"]["test_accuracy"], "checkpoint": sha256(path)[:12],
    }  # fmt: skip
    return Engine(logits, state["labels"], state["max_length"], info)


def onnx_engine(folder: Path) -> Engine:
    """The int8 file that export.py made of the checkpoint, on the CPU."""
    import onnxruntime

    path, again = folder / ONNX, "export it again: python inference/export.py --to onnx"
    facts = read_facts(folder)
    if facts is None:
        raise LoadError(f"no usable {ONNX_FACTS} in {folder}; {again}")
    if (folder / CHECKPOINT).exists() and facts["checkpoint_sha256"] != sha256(folder / CHECKPOINT):
        raise LoadError(f"{path} was made of another checkpoint than {CHECKPOINT}; {again}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()  # ONNX Runtime does not read OMP_NUM_THREADS
    # threads spin for the next piece of a batch, not for the next batch: an idle one would take the
    # core that answers HTTP
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    try:
        found = sha256(path)
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}; {again}") from None
    if found != facts["onnx_sha256"]:
        raise LoadError(f"{path} is damaged or not the one of {ONNX_FACTS}; {again}")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's own have no base class in common but this
        raise LoadError(f"{path} is no model that onnxruntime can run; {again}") from None

    def logits(input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        feed = {"input_ids": input_ids, "attention_mask": attention_mask}
        return session.run(None, feed)[0]

    info = facts["info"] | {"engine": "onnx", "device": "cpu"}
    return Engine(logits, facts["labels"], facts["max_length"], info)


def read_facts(folder: Path) -> dict | None:
    try:
        facts = json.loads((folder / ONNX_FACTS).read_text())
        wanted = {"checkpoint_sha256", "onnx_sha256", "labels", "max_length", "info"}
        return facts if wanted <= facts.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def choose_engine(choice: str, folder: Path) -> str:
    """`auto` -> onnx, if its file belongs to the checkpoint at hand or stands alone; else torch."""
    if choice not in {"auto", "torch", "onnx"}:
        raise LoadError(f"ENGINE={choice}: expected auto, torch or onnx")
    if choice != "auto":
        return choice
    facts = read_facts(folder)
    if facts is None or not (folder / ONNX).exists():
        return "torch"
    if not (folder / CHECKPOINT).exists():
        return "onnx"
    return "onnx" if facts["checkpoint_sha256"] == sha256(folder / CHECKPOINT) else "torch"


class Classifier:
    """A trained model with its tokenizer: texts to tokens, and tokens to the scores of labels."""

    def __init__(self, folder: Path = CHECKPOINTS, engine: str = "auto"):
        chosen = choose_engine(engine, folder)
        self.engine = torch_engine(folder) if chosen == "torch" else onnx_engine(folder)
        self.labels, self.info = self.engine.labels, self.engine.info
        path = folder / "tokenizer" / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_str(path.read_text())
        except Exception as error:  # missing, or tokenizers' own bare Exception
            what = "no tokenizer at" if isinstance(error, OSError) else "damaged:"
            raise LoadError(f"{what} {path}; {REMEDY}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()  # done below, where it is seen whether it happened
        self.end = self.tokenizer.encode("").ids[-1]  # [SEP]
        self.scores([self.encode("warm up").ids])

    def encode(self, text: str) -> Encoded:
        """The ids that training would see, cut to the same length as there."""
        ids, limit = self.tokenizer.encode(text).ids, self.engine.max_length
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
        }

    def predict(self, texts: list[str]) -> list[dict]:
        """One batch, without a server: {label, confidence, scores, truncated} for each text."""
        encoded = [self.encode(text) for text in texts]
        scores = self.scores([row.ids for row in encoded])
        return [self.answer(*pair) for pair in zip(encoded, scores, strict=True)]


if __name__ == "__main__":
    try:
        print(json.dumps(Classifier().predict(sys.argv[1:])))
    except LoadError as error:
        sys.exit(f"error: {error}")
