"""Reads the checkpoint that training left, in a process that never saw a process group.

python -m inference.model_loader "Shares rose after the bank raised its forecast"
"""

import json
import sys
from pathlib import Path

import torch

from training.model import Config, NewsClassifier
from training.utils import CheckpointError, load_checkpoint

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


class Classifier:
    """The trained model with its tokenizer and labels."""

    def __init__(self, folder: Path = CHECKPOINTS):
        from transformers import AutoTokenizer

        path = folder / "distilbert_agnews.pt"
        keys = ("model", "config", "labels", "max_length", "metrics", "provenance")
        self.checkpoint = load_checkpoint(path, keys)
        self.labels = self.checkpoint["labels"]
        try:
            self.model = NewsClassifier(Config(**self.checkpoint["config"])).eval()
            self.model.load_state_dict(self.checkpoint["model"])
        except (TypeError, RuntimeError, AttributeError):
            raise CheckpointError(
                f"{path}: its weights do not fit its config; train again"
            ) from None
        if self.model.config.num_labels != len(self.labels):
            raise CheckpointError(
                f"{path} has {self.model.config.num_labels} classes and {len(self.labels)} labels; "
                "train again"
            )
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise CheckpointError(f"{path} holds weights that are no finite numbers; train again")
        if not (folder / "tokenizer").is_dir():
            raise CheckpointError(f"no tokenizer at {folder / 'tokenizer'}; train again")
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    @torch.inference_mode()
    def predict(self, texts: list[str]) -> list[dict]:
        """texts -> for each {"label", "confidence", "scores"}; scores are softmax probabilities."""
        tokens = self.tokenizer(
            texts, truncation=True, max_length=self.checkpoint["max_length"],
            padding=True, return_tensors="pt",
        )  # fmt: skip
        logits = self.model(tokens["input_ids"], tokens["attention_mask"])
        answers = []
        for row in logits.softmax(-1).tolist():
            scores = dict(zip(self.labels, row, strict=True))
            label = max(scores, key=scores.get)
            answers.append({"label": label, "confidence": scores[label], "scores": scores})
        return answers


if __name__ == "__main__":
    try:
        print(json.dumps(Classifier().predict(sys.argv[1:])[0]))
    except CheckpointError as error:
        sys.exit(f"error: {error}")
