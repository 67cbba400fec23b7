"""The checkpoint in other forms is the same model: pytest tests/test_export.py"""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from ranks import ROOT, environment
from server import server
from stand_ins import COMMON, WORDS

import checkpoint
from inference import export
from inference.model_loader import ONNX, ONNX_FACTS, Classifier, LoadError, sha256


@pytest.fixture(scope="module")
def texts():
    """200 texts of 1 to 200 words: some longer than the model reads."""
    rng = random.Random(0)
    words = [*COMMON, *" ".join(WORDS.values()).split(), "unheard-of", "caf\u00e9", "\U0001f3c6"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 200))) for _ in range(200)]


@pytest.fixture
def copy(exported, tmp_path):
    """Checkpoint, tokenizer and int8 files, to be spoilt."""
    return shutil.copytree(exported, tmp_path / "c")


def test_labels_and_scores_equal_those_of_transformers_pipeline(trained, texts):
    import transformers

    folder = trained / "hf"
    export.to_hf(trained, folder)
    pipe = transformers.pipeline("text-classification", str(folder), top_k=None)
    expected = pipe(texts, truncation=True, batch_size=1)
    found = [Classifier(trained, "torch").predict([text])[0] for text in texts]
    assert sum(answer["truncated"] for answer in found) > 20
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs[0]["label"] == ours["label"]
        scores = {row["label"]: row["score"] for row in theirs}
        assert ours["scores"] == pytest.approx(scores, abs=1e-4)


def test_the_exported_folder_carries_labels_metrics_and_a_model_card(trained):
    from huggingface_hub import ModelCard

    export.to_hf(trained, trained / "hf")
    config = json.loads((trained / "hf" / "config.json").read_text())
    assert config["id2label"] == {"0": "World", "1": "Sports", "2": "Business", "3": "Sci/Tech"}
    assert config["architectures"] == ["DistilBertForSequenceClassification"]
    card = ModelCard.load(trained / "hf" / "README.md")
    accuracy = torch.load(trained / "distilbert_agnews.pt")["metrics"]["test_accuracy"]
    assert card.data.eval_results[0].metric_value == pytest.approx(accuracy, abs=1e-4)
    assert card.data.pipeline_tag == "text-classification"


def test_a_text_alone_and_in_any_batch_gets_the_same_scores(trained, texts):
    classifier = Classifier(trained, "torch")
    rows = [classifier.encode(text).ids for text in texts]
    alone = np.concatenate([classifier.scores([row]) for row in rows])
    for size in (2, 7, 64):
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        together = np.concatenate([classifier.scores(batch) for batch in batches])
        assert np.abs(together - alone).max() < 1e-5


def test_int8_agrees_with_the_exact_model(exported, texts):
    exact, int8 = (Classifier(exported, engine).predict(texts) for engine in ("torch", "onnx"))
    agree = [a["label"] == b["label"] for a, b in zip(exact, int8, strict=True)]
    assert np.mean(agree) >= 0.97  # random words are nearer to the border than news
    figures = json.loads((exported / ONNX_FACTS).read_text())["figures"]
    assert figures["agreement"] >= 0.99
    assert figures["torch_accuracy"] - figures["int8_accuracy"] <= 0.003
    assert figures["rows"] == 8  # 5 % of 120 training rows, of every class alike


@pytest.mark.parametrize("name, value", [("MOST_LOST", -2.0), ("LEAST_AGREEING", 1.01)])
def test_int8_that_is_not_good_enough_is_not_written(
    copy, news_folder, monkeypatch, name, value
):
    before = (copy / ONNX).read_bytes()
    monkeypatch.setattr(export, name, value)
    with pytest.raises(LoadError, match="nothing was written.*ENGINE=torch"):
        export.to_onnx(copy, str(news_folder))
    assert (copy / ONNX).read_bytes() == before
    assert len(list(copy.glob("*.onnx"))) == 1


def test_auto_takes_int8_when_it_belongs_to_the_checkpoint(copy):
    assert Classifier(copy).info["engine"] == "onnx"
    state = torch.load(copy / "distilbert_agnews.pt")
    checkpoint.save_checkpoint(state | {"newer": True}, copy / "distilbert_agnews.pt")  # newer
    assert Classifier(copy).info["engine"] == "torch"
    with pytest.raises(LoadError, match="made of another checkpoint.*--to onnx"):
        Classifier(copy, "onnx")
    (copy / "distilbert_agnews.pt").unlink()  # as in an image: int8 and nothing else
    assert Classifier(copy).info["engine"] == "onnx"
    (copy / ONNX_FACTS).unlink()
    with pytest.raises(LoadError, match="no checkpoint"):
        Classifier(copy)


@pytest.mark.parametrize("how", ["cut", "no model", "no file", "no facts", "foreign"])
def test_a_spoilt_int8_file_is_one_line(copy, how):
    if how == "cut":
        (copy / ONNX).write_bytes((copy / ONNX).read_bytes()[:-100])
    elif how == "no model":
        (copy / ONNX).write_bytes(b"no model")
        facts = json.loads((copy / ONNX_FACTS).read_text())
        (copy / ONNX_FACTS).write_text(json.dumps(facts | {"onnx_sha256": sha256(copy / ONNX)}))
    elif how == "no file":
        (copy / ONNX).unlink()
    elif how == "no facts":
        (copy / ONNX_FACTS).unlink()
    else:
        (copy / ONNX_FACTS).write_text("[1]")
    with pytest.raises(LoadError) as caught:
        Classifier(copy, "onnx")
    assert "--to onnx" in str(caught.value) and "\n" not in str(caught.value)


def test_with_int8_the_server_imports_neither_torch_nor_transformers(exported):
    code = (
        "import sys, inference.app as app\n"
        "from pathlib import Path\n"
        "found = app.Classifier(Path(sys.argv[1]), 'onnx').predict(['bank'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'onnx'} & sys.modules.keys()\n"
        "print(found[0]['label'], heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported)], cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "Business set()\n", done.stdout + done.stderr


def test_both_engines_answer_over_http(exported):
    import httpx

    for engine in ("torch", "onnx"):
        with server(exported, ENGINE=engine) as url:
            assert httpx.get(f"{url}/health").json()["model"]["engine"] == engine
            assert httpx.post(f"{url}/predict", json={"text": "bank"}).json()["label"] == "Business"


def test_without_a_checkpoint_export_is_one_line(tmp_path):
    for to in ("onnx", "hf"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "inference" / "export.py"), "--to", to,
             "--checkpoint-dir", str(tmp_path)], cwd=tmp_path, env=environment(),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1 and "no checkpoint at" in done.stderr


def test_facts_name_the_files_they_belong_to(exported):
    facts = json.loads((exported / ONNX_FACTS).read_text())
    assert facts["checkpoint_sha256"] == sha256(exported / "distilbert_agnews.pt")
    assert facts["onnx_sha256"] == sha256(exported / ONNX)
