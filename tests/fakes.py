"""Small fakes of a backbone and for AG News, made in a moment."""

import csv
import random
from pathlib import Path

WORDS = {
    "World": "minister election troops border treaty embassy rebels summit parliament refugees",
    "Sports": "match goal coach season striker innings playoff champion tournament referee",
    "Business": "shares profit market bank merger investors inflation earnings exports retailer",
    "Sci/Tech": "software satellite browser telescope virus chip genome robot broadband server",
}
COMMON = "the a of in to on for after new over with says as two its from is at will this".split()


def make_backbone(folder: Path, dropout: float, tokenizer: Path | None = None) -> Path:
    """A DistilBERT of two layers of width 32, with random weights and a tokenizer of 65 words.

    `tokenizer` is a folder with another one.
    """
    import torch
    from transformers import (
        AutoTokenizer,
        BertTokenizerFast,
        DistilBertConfig,
        DistilBertForMaskedLM,
    )

    folder.mkdir(exist_ok=True)
    words = [*COMMON, *(word for line in WORDS.values() for word in line.split())]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    if tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    else:
        (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
        tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        dropout=dropout,
        attention_dropout=dropout,
        seq_classif_dropout=2 * dropout,
    )
    DistilBertForMaskedLM(config).save_pretrained(folder)
    return folder


def make_news(folder: Path) -> Path:
    """120 training and 53 test rows, in two of the forms that AG News comes in."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)

    def text(label):
        own = list(WORDS.values())[label].split()
        words = (rng.choice(own if rng.random() < 0.3 else COMMON) for _ in range(40))
        return " ".join(list(words)[: rng.randint(5, 40)])

    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text(i % 4), i % 4) for i in range(120))])
    with open(folder / "test.csv", "w", newline="") as file:
        csv.writer(file).writerows((i % 4 + 1, text(i % 4), text(i % 4)) for i in range(53))
    return folder
