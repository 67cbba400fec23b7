"""The checkpoint in other forms: int8 for the server, or a folder for transformers.

python inference/export.py --to onnx     dynamic int8 under ONNX Runtime, if it is as good
python inference/export.py --to hf       checkpoints/hf, for transformers.pipeline
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

if __name__ == "__main__" and not __package__:  # by path, imports are looked for beside this file
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    os.execv(sys.executable, [sys.executable, "-m", "inference.export", *sys.argv[1:]])

import numpy as np
import torch

from inference.model_loader import (
    CHECKPOINT,
    CHECKPOINTS,
    ONNX,
    ONNX_FACTS,
    Engine,
    LoadError,
    onnx_engine,
    sha256,
    torch_engine,
)
from training.checkpoint import load_checkpoint
from training.dataset import DataError, eval_loader, prepare_data
from training.model import Config, NewsClassifier

MOST_LOST = 0.003  # of accuracy
LEAST_AGREEING = 0.99  # of the labels


def load(folder: Path) -> tuple[NewsClassifier, dict]:
    """The trained model on the CPU, and all of its checkpoint."""
    state = load_checkpoint(folder / CHECKPOINT, ("model", "config"))
    model = NewsClassifier(Config(**state["config"])).eval()
    model.load_state_dict(state["model"])
    return model, state


def write_int8(model: NewsClassifier, path: Path) -> None:
    """Weights as int8, a scale for each output channel; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    example = (torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64))
    free = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=512)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, example, dynamo=True, verbose=False, output_names=["logits"],
            input_names=["input_ids", "attention_mask"],
            dynamic_shapes={"input_ids": free, "attention_mask": free},
        )  # fmt: skip
        program.save(f"{folder}/fp32.onnx")
        # only products with a weight; attention's own, of two activations, stay in fp32
        quantize_dynamic(
            f"{folder}/fp32.onnx", path, per_channel=True, weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip


def labels_of(engine: Engine, loader) -> np.ndarray:
    return np.concatenate(
        [engine.logits(ids.numpy(), mask.long().numpy()).argmax(-1) for ids, mask, _ in loader]
    )


def compare(exact: Engine, int8: Engine, val) -> dict:
    """Both engines on the validation rows, in batches as the server forms them."""
    loader = eval_loader(val, 16)
    labels = np.concatenate([labels.numpy() for _, _, labels in loader])
    ours, theirs = labels_of(exact, loader), labels_of(int8, loader)
    return {
        "rows": len(labels),
        "torch_accuracy": float((ours == labels).mean()),
        "int8_accuracy": float((theirs == labels).mean()),
        "agreement": float((ours == theirs).mean()),
    }


def to_onnx(folder: Path, choice: str | None) -> None:
    """Writes the int8 file and its facts, or raises LoadError and leaves no new file."""
    exact = torch_engine(folder)  # refuses what the server would refuse
    model, state = load(folder)
    if choice is None:
        choice = "sample" if state["provenance"]["data"] == "sample" else "auto"
    data = prepare_data(choice, folder / "tokenizer", exact.max_length, None, None)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        place = Path(place)
        write_int8(model, place / ONNX)
        facts = {
            "checkpoint_sha256": sha256(folder / CHECKPOINT), "onnx_sha256": sha256(place / ONNX),
            "labels": exact.labels, "max_length": exact.max_length,
            "info": {k: v for k, v in exact.info.items() if k not in ("engine", "device")},
        }  # fmt: skip
        (place / ONNX_FACTS).write_text(json.dumps(facts))
        figures = compare(exact, onnx_engine(place), data.val) | {"data": data.source}
        lost = figures["torch_accuracy"] - figures["int8_accuracy"]
        said = (f"{figures['rows']:,} validation rows of {data.source}: accuracy "
                f"{figures['torch_accuracy']:.4f} -> {figures['int8_accuracy']:.4f}, "
                f"{figures['agreement']:.2%} of the labels agree")  # fmt: skip
        if lost > MOST_LOST or figures["agreement"] < LEAST_AGREEING:
            raise LoadError(
                f"int8 is not good enough, nothing was written: {said}; serve with ENGINE=torch"
            )
        (place / ONNX_FACTS).write_text(json.dumps(facts | {"figures": figures}, indent=1) + "\n")
        # without its facts an int8 file is not served, so no crash leaves a pair that is none
        (folder / ONNX_FACTS).unlink(missing_ok=True)
        os.replace(place / ONNX, folder / ONNX)
        os.replace(place / ONNX_FACTS, folder / ONNX_FACTS)
    print(f"{said}\nwrote {folder / ONNX} ({(folder / ONNX).stat().st_size / 2**20:.0f} MiB)")


def model_card(state: dict) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    metrics, origin = state["metrics"], state["provenance"]
    bases = {"packaged": "sentence-transformers/all-MiniLM-L6-v2",
             "distilbert-base-uncased": "distilbert/distilbert-base-uncased"}  # fmt: skip
    agnews = origin["data"] != "sample"
    card = ModelCardData(
        language="en", license="other" if agnews else "mit", library_name="transformers",
        pipeline_tag="text-classification", base_model=bases.get(origin["model"]),
        datasets=["fancyzhx/ag_news"] if agnews else None, metrics=["accuracy"],
        model_name="DistriNews",
        eval_results=[EvalResult(
            task_type="text-classification", dataset_type="fancyzhx/ag_news" if agnews else "other",
            dataset_name=origin["data"], dataset_split="test", metric_type="accuracy",
            metric_value=round(metrics["test_accuracy"], 4),
        )],
    )  # fmt: skip
    licence = (
        "AG News is for research and other non-commercial use."
        if agnews
        else "The 480 items it was trained on were written for DistriNews: a demonstration, whose "
        "accuracy is not an AG News figure."
    )
    recipe = ", ".join(f"{key} {origin[key]}" for key in
                       ("lr", "warmup", "global_batch_size", "total_steps", "world_size",
                        "precision", "seed"))  # fmt: skip
    return f"""---
{card.to_yaml()}
---
# DistriNews

Labels English news as {", ".join(state["labels"])}; trained by DistriNews.

- Data: {origin["data"]}, {origin["train_samples"]:,} training rows. {licence}
- Backbone: {origin["model"]}
- Test accuracy: {metrics["test_accuracy"]:.4f} on {metrics["test_samples"]:,} rows; validation
  accuracy {metrics["val_accuracy"]:.4f}
- Recipe: {recipe}; on {origin["host"]}
- Reads the first {state["max_length"]} tokens of a text.

Made for agency news of 2004 and its four sections; other texts get one of the four labels too. It
repeats what its data holds of that time and those agencies.
"""


def to_hf(folder: Path, out: Path) -> None:
    """A folder that `transformers.pipeline("text-classification", ...)` loads."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    torch_engine(folder)
    _, state = load(folder)
    shape = dict(state["config"])
    names = dict(enumerate(state["labels"]))
    config = DistilBertConfig(
        **shape, id2label=names, label2id={name: i for i, name in names.items()}, pad_token_id=0
    )
    model = DistilBertForSequenceClassification(config)
    model.load_state_dict(state["model"], strict=True)
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.model_max_length = state["max_length"]
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(model_card(state))
    print(f'wrote {out}; transformers.pipeline("text-classification", "{out}", truncation=True)')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", choices=["onnx", "hf"], required=True)
    parser.add_argument("--checkpoint-dir", type=Path, default=CHECKPOINTS)
    parser.add_argument("--data", help="whose validation split judges int8 (default: the sample "
                        "for a model of the sample, else auto)")  # fmt: skip
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # the exporter's hints are for those who write one
    if args.to == "onnx":
        to_onnx(args.checkpoint_dir, args.data)
    else:
        to_hf(args.checkpoint_dir, args.checkpoint_dir / "hf")


if __name__ == "__main__":
    try:
        main()
    except (LoadError, DataError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write {error.filename}: {error.strerror}")
