"""The checkpoint in other forms: int8 for the server, or a folder for transformers.

python inference/export.py --to int8     static int8 for OpenVINO, at most 0.3 points worse
python inference/export.py --to hf       checkpoints/hf, for transformers.pipeline
"""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path

if not __package__:  # started by its path: imports would be looked for beside this file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import numpy as np
import torch

from inference.model_loader import (
    CHECKPOINT,
    CHECKPOINTS,
    HASHES,
    INT8_BIN,
    INT8_FILES,
    INT8_METADATA,
    INT8_XML,
    TOKENIZER,
    Engine,
    LoadError,
    import_openvino,
    int8_engine,
    load_model,
    metadata_sha256,
    sha256,
    stamps,
    torch_engine,
)
from training.ag_news import HUB_DATASET, SIZES, SourceError, find_data
from training.checkpoint import hold_signals
from training.dataset import DataError, TokenizedExamples, eval_loader, prepare_data
from training.errors import repair_output

MAX_ACCURACY_DROP = 0.003
MIN_AGREEMENT = 0.99  # share of validation rows whose label int8 does not change
CALIBRATION_ROWS = 300


def make_readable(folder: Path) -> None:
    """Everyone may read what was exported, whatever the umask: a container has another user."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextlib.contextmanager
def writing(path: Path):
    """A full disk is an error of another kind in each library."""
    try:
        yield
    except Exception as error:
        raise LoadError(f"cannot write {path}: {error}; is the disk full?") from None


def write_int8(model: torch.nn.Module, rows: list[np.ndarray], path: Path) -> None:
    """`model` as OpenVINO's .xml and .bin, static int8: the scales of activations are fixed by what
    they are for `rows` of token ids, so a text's scores depend on its batch by rounding alone."""
    example = (torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # progress bars
        warnings.simplefilter("ignore")
        with hold_signals():  # an exception in the middle of these imports can hang
            openvino = import_openvino()
            import nncf
        nncf.set_log_level(logging.ERROR)
        exact = openvino.convert_model(model, example_input=example)
        quantized = nncf.quantize(
            exact,
            nncf.Dataset([{"input_ids": x, "attention_mask": np.ones_like(x)} for x in rows]),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,  # with SmoothQuant
            subset_size=len(rows),
            # embeddings stay exact: int8 ones would be unpacked to fp32 in memory at every start
            ignored_scope=nncf.IgnoredScope(types=["Gather"]),
        )
    with writing(path):
        openvino.save_model(quantized, path, compress_to_fp16=False)


def calibration_rows(train: TokenizedExamples) -> list[np.ndarray]:
    """Training rows, (1, tokens) each: padding would count as text. Their order is random."""
    return [train[i][0].long().numpy()[None] for i in range(min(CALIBRATION_ROWS, len(train)))]


def labels_of(engine: Engine, loader) -> np.ndarray:
    return np.concatenate(
        [engine.logits(ids.numpy(), mask.long().numpy()).argmax(-1) for ids, mask, _ in loader]
    )


def compare(exact: Engine, int8: Engine, val: TokenizedExamples) -> dict:
    """Both engines on the validation rows, in batches as the server forms them."""
    loader = eval_loader(val, 16)
    labels = np.concatenate([labels.numpy() for _, _, labels in loader])
    exact_labels, int8_labels = labels_of(exact, loader), labels_of(int8, loader)
    return {
        "rows": len(labels),
        "torch_accuracy": float((exact_labels == labels).mean()),
        "int8_accuracy": float((int8_labels == labels).mean()),
        "agreement": float((exact_labels == int8_labels).mean()),
    }


def write_metadata(folder: Path, checkpoint: Path, engine: Engine, **figures) -> None:
    """The json beside an int8 model that was made of the checkpoint behind `engine`."""
    metadata = {key: sha256(folder / name) for key, name in HASHES.items()}
    metadata |= {"checkpoint_sha256": sha256(checkpoint)}
    metadata |= {key: getattr(engine, key) for key in ("labels", "max_length", "vocab_size")}
    metadata["info"] = {k: v for k, v in engine.info.items() if k not in ("engine", "device")}
    metadata |= figures
    metadata["metadata_sha256"] = metadata_sha256(metadata)
    text = json.dumps(metadata, indent=1) + "\n"
    (folder / INT8_METADATA).write_text(text, encoding="utf-8")


def to_int8(folder: Path, choice: str | None) -> None:
    """Writes the int8 model and its metadata, or raises LoadError and writes nothing."""
    before = stamps(folder)
    exact = torch_engine(folder)
    model, state = load_model(folder)
    trained_on = state["provenance"]["data"]
    if choice is None:
        choice = "sample" if trained_on == "sample" else "auto"
    source = find_data(choice)
    if choice == "auto" and source.name != trained_on:
        raise LoadError(
            f"the model was trained on {trained_on}, and auto found {source.name} ({source.why}); "
            "name it with --data (ag_news, or its folder)"
        )
    data = prepare_data(source, folder / "tokenizer", exact.max_length, None, None)
    rows = calibration_rows(data.train)
    print(f"quantizing with {len(rows)} training rows of {data.source}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
        new = Path(new)
        write_int8(model, rows, new / INT8_XML)
        (new / TOKENIZER).parent.mkdir()
        shutil.copyfile(folder / TOKENIZER, new / TOKENIZER)
        write_metadata(new, folder / CHECKPOINT, exact)
        figures = compare(exact, int8_engine(new), data.val) | {"data": data.source}
        result = (
            f"{figures['rows']:,} validation rows of {data.source}: accuracy "
            f"{figures['torch_accuracy']:.4f} -> {figures['int8_accuracy']:.4f}, "
            f"{figures['agreement']:.2%} equal labels"
        )
        drop = figures["torch_accuracy"] - figures["int8_accuracy"]
        if drop > MAX_ACCURACY_DROP or figures["agreement"] < MIN_AGREEMENT:
            raise LoadError(
                f"int8 is not good enough, nothing was written: {result}; serve with ENGINE=torch"
            )
        write_metadata(new, folder / CHECKPOINT, exact, figures=figures)
        if stamps(folder) != before:  # a run has saved: this int8 model is not of what lies there
            raise LoadError(f"{folder} changed meanwhile, nothing was written; export again")
        make_readable(new)
        # without its metadata an int8 model is not served, so a crash leaves no wrong pair
        (folder / INT8_METADATA).unlink(missing_ok=True)
        for name in INT8_FILES:
            os.replace(new / name, folder / name)
    size = (folder / INT8_BIN).stat().st_size / 2**20
    print(f"{result}\nwrote {folder / INT8_XML}, .bin ({size:.0f} MiB) and .json")


def model_card(state: dict) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    metrics, origin = state["metrics"], state["provenance"]
    bases = {
        "packaged": "sentence-transformers/all-MiniLM-L6-v2",
        "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    }
    agnews = origin["data"] != "sample"
    # a folder of one's own may hold anything
    original = origin["data"] == HUB_DATASET or metrics["test_samples"] == SIZES[1]
    result = EvalResult(
        task_type="text-classification",
        dataset_type=HUB_DATASET if original else "other",
        dataset_name=origin["data"],
        dataset_split="test",
        metric_type="accuracy",
        metric_value=round(metrics["test_accuracy"], 4),
    )
    card = ModelCardData(
        language="en",
        license="other" if agnews else "mit",
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=bases.get(origin["model"]),
        datasets=[HUB_DATASET] if original else None,
        metrics=["accuracy"],
        model_name="DistriNews",
        eval_results=[result],
    )
    licence = (
        "AG News is for research and other non-commercial use."
        if agnews
        else "The 480 items it was trained on were written for DistriNews: a demonstration, whose "
        "accuracy is not an AG News figure."
    )
    keys = "lr warmup global_batch_size total_steps world_size precision seed".split()
    recipe = ", ".join(f"{key} {origin[key]}" for key in keys)
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

Trained on agency news of 2004 with four sections; any other text still gets one of the four.
It reflects the biases of that time and those agencies.
"""


def to_hf(folder: Path) -> None:
    """A folder that `transformers.pipeline("text-classification", ...)` loads."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    model, state = load_model(folder)
    if not (folder / TOKENIZER).exists():
        raise LoadError(f"no tokenizer at {folder / TOKENIZER}; train again")
    shape = asdict(model.config)
    if (eps := shape.pop("layer_norm_eps")) != 1e-12:
        raise LoadError(
            f"layer_norm_eps of {folder / CHECKPOINT} is {eps}; transformers computes DistilBERT "
            "with 1e-12 alone, and would give other scores; serve it with inference/app.py"
        )
    names = dict(enumerate(state["labels"]))
    config = DistilBertConfig(
        **shape, id2label=names, label2id={name: i for i, name in names.items()}, pad_token_id=0
    )
    exported = DistilBertForSequenceClassification(config)
    exported.load_state_dict(state["model"], strict=True)
    inputs = ["input_ids", "attention_mask"]  # a BERT tokenizer gives a third one
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", model_input_names=inputs)
    tokenizer.model_max_length = state["max_length"]
    out = folder / "hf"
    with tempfile.TemporaryDirectory(dir=folder) as new:
        new = Path(new, "hf")
        with writing(out):
            exported.save_pretrained(new)
            tokenizer.save_pretrained(new)
        (new / "README.md").write_text(model_card(state), encoding="utf-8")
        make_readable(new)
        if os.path.lexists(out):
            ours = {path.name for path in new.iterdir()}
            if os.path.islink(out) or not out.is_dir() or {*os.listdir(out)} - ours:
                raise LoadError(f"{out} is not only an earlier export; move it away")
            shutil.rmtree(out)
        os.replace(new, out)
    print(f'wrote {out}; transformers.pipeline("text-classification", "{out}", truncation=True)')


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--to", choices=["int8", "hf"], required=True)
    add("--checkpoint-dir", type=Path, default=CHECKPOINTS, help="(default: %(default)s)")
    judge = "its training rows calibrate int8, its validation rows check it (default: "
    add("--data", help=judge + "sample for a model of the sample, else auto)")
    args = parser.parse_args()
    args.checkpoint_dir = args.checkpoint_dir.expanduser()
    if args.data and args.to == "hf":
        parser.error("--data goes with --to int8")
    logging.disable(logging.WARNING)  # hints for library developers
    if args.to == "int8":
        to_int8(args.checkpoint_dir, args.data)
    else:
        to_hf(args.checkpoint_dir)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # unfinished files are removed
        signal.signal(number, signal.default_int_handler)
    repair_output()
    try:
        main()
    except (LoadError, SourceError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}; pip install -r requirements.txt")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; run the same command again")
