"""Small stand-ins that every test shares: a backbone, news rows, a way to run the scripts."""

import csv
import random
import subprocess
import sys

import pytest
from ranks import ROOT, environment

WORDS = {
    "World": "minister election troops border treaty embassy rebels summit parliament refugees",
    "Sports": "match goal coach season striker innings playoff champion tournament referee",
    "Business": "shares profit market bank merger investors inflation earnings exports retailer",
    "Sci/Tech": "software satellite browser telescope virus chip genome robot broadband server",
}
COMMON = "the a of in to on for after new over with says as two its from is at will this".split()


def make_backbone(folder, dropout):
    import torch
    from transformers import BertTokenizerFast, DistilBertConfig, DistilBertForMaskedLM

    words = [*COMMON, *(word for line in WORDS.values() for word in line.split())]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(vocab), max_position_embeddings=128, dim=32, n_layers=2, n_heads=4,
        hidden_dim=64, dropout=dropout, attention_dropout=dropout, seq_classif_dropout=2 * dropout,
    )  # fmt: skip
    DistilBertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("tiny"), 0.1)


@pytest.fixture(scope="session")
def calm_backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("calm"), 0.0)


@pytest.fixture(scope="session")
def news_folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("news"), random.Random(0)

    def text(label):
        own = list(WORDS.values())[label].split()
        words = (rng.choice(own if rng.random() < 0.3 else COMMON) for _ in range(40))
        return " ".join(list(words)[: rng.randint(5, 40)])

    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text(i % 4), i % 4) for i in range(120))])
    with open(folder / "test.csv", "w", newline="") as file:
        csv.writer(file).writerows((i % 4 + 1, text(i % 4), text(i % 4)) for i in range(53))
    return folder


@pytest.fixture(scope="session")
def trained(tiny_backbone, news_folder, tmp_path_factory):
    """A checkpoint folder as train_single.py leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, ROOT / "training" / "train_single.py", "--model", tiny_backbone,
               "--data", news_folder, "--checkpoint-dir", folder / "c", "--lr", "5e-3",
               "--epochs", 20, "--global-batch-size", 8, "--dropout", 0]  # fmt: skip
    subprocess.run([*map(str, command)], cwd=folder, env=environment(), check=True, timeout=100)
    return folder / "c"


@pytest.fixture(scope="session")
def exported(trained, news_folder):
    """`trained` with its int8 files beside it, as export.py writes them."""
    command = [sys.executable, ROOT / "inference" / "export.py", "--to", "onnx", "--data",
               news_folder, "--checkpoint-dir", trained]  # fmt: skip
    env = environment()
    del env["PYTHONPATH"]  # a user has none
    subprocess.run([*map(str, command)], cwd=trained, env=env, check=True, timeout=100)
    return trained
