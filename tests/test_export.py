"""The checkpoint in other forms is the same model: pytest tests/test_export.py"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fakes import COMMON, WORDS
from ranks import ROOT, environment, run

import checkpoint
from ag_news import read_folder
from inference import export, model_loader
from inference.model_loader import INT8_BIN, Classifier, LoadError, sha256


@pytest.fixture(scope="module")
def texts():
    """200 texts of 1 to 200 words: some longer than the model reads."""
    rng = random.Random(0)
    words = [*COMMON, *" ".join(WORDS.values()).split(), "unheard-of", "caf\u00e9", "\U0001f3c6"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 200))) for _ in range(200)]


@pytest.fixture
def copy(exported, tmp_path):
    """Checkpoint, tokenizer and int8 files, to be corrupted."""
    return shutil.copytree(exported, tmp_path / "c")


def test_labels_and_scores_equal_those_of_transformers_pipeline(trained, texts):
    import transformers

    export.to_hf(trained)
    pipe = transformers.pipeline("text-classification", str(trained / "hf"), top_k=None)
    expected = pipe(texts[:60], truncation=True, batch_size=1)
    classifier = Classifier(trained, "torch")
    found = [classifier.predict([text])[0] for text in texts[:60]]
    assert sum(answer["truncated"] for answer in found) > 10
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs[0]["label"] == ours["label"]
        scores = {row["label"]: row["score"] for row in theirs}
        assert ours["scores"] == pytest.approx(scores, abs=1e-4)


def test_the_exported_folder_carries_labels_metrics_and_a_model_card(trained):
    from huggingface_hub import ModelCard
    from transformers import AutoTokenizer

    export.to_hf(trained)
    config = json.loads((trained / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "World", "1": "Sports", "2": "Business", "3": "Sci/Tech"}
    assert config["architectures"] == ["DistilBertForSequenceClassification"]
    tokenizer = AutoTokenizer.from_pretrained(trained / "hf")
    assert [*tokenizer("bank")] == ["input_ids", "attention_mask"]  # all that the model takes
    card = ModelCard.load(trained / "hf" / "README.md")
    accuracy = torch.load(trained / "distilbert_agnews.pt")["metrics"]["test_accuracy"]
    assert card.data.eval_results[0].metric_value == pytest.approx(accuracy, abs=1e-4)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.datasets is None  # a folder of one's own is not the Hub's ag_news


def test_a_folder_with_files_of_ones_own_is_not_replaced(copy):
    export.to_hf(copy)
    export.to_hf(copy)  # an earlier export is
    (copy / "hf" / ".git").mkdir()
    with pytest.raises(LoadError, match="hf is not only an earlier export; move it away"):
        export.to_hf(copy)
    assert (copy / "hf" / ".git").exists()


def test_an_epsilon_that_transformers_does_not_compute_is_refused(copy):
    path = copy / "distilbert_agnews.pt"
    state = torch.load(path)
    state["config"]["layer_norm_eps"] = 1e-5
    checkpoint.save_checkpoint(state, path)
    Classifier(copy, "torch")
    with pytest.raises(LoadError, match="layer_norm_eps .* is 1e-05; transformers"):
        export.to_hf(copy)


def test_files_can_be_read_by_every_user_whatever_the_umask(copy):
    before = os.umask(0o077)  # as that of the fixture `exported`, which wrote the int8 files
    try:
        export.to_hf(copy)
    finally:
        os.umask(before)
    files = [copy / name for name in model_loader.INT8_FILES] + [*(copy / "hf").iterdir()]
    assert len(files) > 6
    assert {oct(file.stat().st_mode) for file in files} == {"0o100644"}
    assert oct((copy / "hf").stat().st_mode) == "0o40755"


def test_a_text_gets_the_same_label_and_scores_in_every_batch(exported, texts):
    classifier = Classifier(exported, "int8")
    rows = [classifier.encode(text).ids for text in texts]
    alone = np.concatenate([classifier.scores([row]) for row in rows])
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, 8, 16, 16, 16, 64) * 3:
        order = rng.permutation(len(rows))
        for batch in np.split(order, range(size, len(order), size)):
            together = classifier.scores([rows[i] for i in batch])
            assert np.abs(together - alone[batch]).max() < 0.005
            assert (together.argmax(-1) == alone[batch].argmax(-1)).all()


def test_int8_agrees_with_the_exact_model(exported, news_folder):
    rows = read_folder(news_folder)[1].texts
    exact, int8 = (Classifier(exported, engine).predict(rows) for engine in ("torch", "int8"))
    equal = [a["label"] == b["label"] for a, b in zip(exact, int8, strict=True)]
    assert np.mean(equal) >= 0.96  # 51 of 53
    figures = json.loads((exported / model_loader.INT8_METADATA).read_text(encoding="utf-8"))[
        "figures"
    ]
    assert figures["agreement"] >= 0.99
    assert figures["torch_accuracy"] - figures["int8_accuracy"] <= 0.003
    assert figures["rows"] == 8  # 5 % of 120 training rows, of every class alike


def test_int8_that_is_not_good_enough_is_not_written(copy, news_folder, monkeypatch):
    monkeypatch.setattr(export, "calibration_rows", lambda train: [np.array([[2, 3]])])
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir() if path.is_file()}
    for name, value in (("MAX_ACCURACY_DROP", -2.0), ("MIN_AGREEMENT", 1.01)):
        with monkeypatch.context() as patch:
            patch.setattr(export, name, value)
            with pytest.raises(LoadError, match="nothing was written.*ENGINE=torch"):
                export.to_int8(copy, str(news_folder))
    after = {path.name: path.stat().st_mtime_ns for path in copy.iterdir() if path.is_file()}
    assert after == before
    assert not [path for path in copy.iterdir() if path.name.startswith("tmp")]


def test_int8_of_a_checkpoint_that_was_replaced_meanwhile_is_not_written(
    copy, news_folder, monkeypatch
):
    def calibrate(train):
        (copy / "distilbert_agnews.pt").touch()  # a run that saves
        return [np.array([[2, 3]])]

    monkeypatch.setattr(export, "calibration_rows", calibrate)
    monkeypatch.setattr(export, "MIN_AGREEMENT", 0)
    monkeypatch.setattr(export, "MAX_ACCURACY_DROP", 1)
    before = {path.name for path in copy.iterdir()}
    with pytest.raises(LoadError, match="changed meanwhile, nothing was written"):
        export.to_int8(copy, str(news_folder))
    assert {path.name for path in copy.iterdir()} == before


def test_auto_takes_int8_when_it_belongs_to_the_checkpoint(copy, monkeypatch):
    assert Classifier(copy).info["engine"] == "int8"
    with monkeypatch.context() as patch:  # a machine that only trains has no openvino
        patch.setitem(sys.modules, "openvino", None)
        assert Classifier(copy).info["engine"] == "torch"
        with pytest.raises(LoadError, match="needs openvino"):
            Classifier(copy, "int8")
    state = torch.load(copy / "distilbert_agnews.pt")
    checkpoint.save_checkpoint(state | {"newer": True}, copy / "distilbert_agnews.pt")
    assert Classifier(copy).info["engine"] == "torch"
    with pytest.raises(LoadError, match="made of another checkpoint.*--to int8"):
        Classifier(copy, "int8")
    (copy / "distilbert_agnews.pt").unlink()  # as in an image: int8 and nothing else
    assert Classifier(copy).info["engine"] == "int8"
    (copy / model_loader.INT8_METADATA).unlink()
    with pytest.raises(LoadError, match="no checkpoint"):
        Classifier(copy)
    with pytest.raises(LoadError, match="ENGINE=onnx: expected auto, torch, int8"):
        Classifier(copy, "onnx")


def replace_text(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def rehash(folder):
    """Notes the files as they are now: what is wrong with them has to be found otherwise."""
    metadata = json.loads((folder / model_loader.INT8_METADATA).read_text(encoding="utf-8"))
    metadata |= {key: sha256(folder / name) for key, name in model_loader.HASHES.items()}
    metadata["metadata_sha256"] = model_loader.metadata_sha256(metadata)
    (folder / model_loader.INT8_METADATA).write_text(json.dumps(metadata), encoding="utf-8")


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda c: (c / model_loader.INT8_BIN).write_bytes(
            (c / model_loader.INT8_BIN).read_bytes()[:-100]
        ),
        lambda c: ((c / model_loader.INT8_XML).write_bytes(b"no model"), rehash(c)),
        lambda c: ((c / model_loader.INT8_BIN).write_bytes(b"no weights"), rehash(c)),
        lambda c: (c / model_loader.INT8_BIN).unlink(),
        lambda c: (c / model_loader.INT8_METADATA).unlink(),
        lambda c: (c / model_loader.INT8_METADATA).write_text("[1]"),
        lambda c: replace_text(c / model_loader.INT8_METADATA, '"World"', '"Worle"'),
        lambda c: replace_text(c / model_loader.INT8_METADATA, '"max_length": ', '"max_length": 9'),
    ],
)
def test_a_corrupted_int8_model_is_one_line(copy, corrupt):
    corrupt(copy)
    with pytest.raises(LoadError) as caught:
        Classifier(copy, "int8")
    assert "--to int8" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["torch", "int8"])
def test_another_tokenizer_than_the_models_is_refused(copy, engine):
    path = copy / model_loader.TOKENIZER
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["shares"], vocab["goal"] = vocab["goal"], vocab["shares"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(LoadError, match="tokenizer.json is"):
        Classifier(copy, engine)
    vocab["newer"] = len(vocab)
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(LoadError, match="tokenizer.json is"):
        Classifier(copy, engine)
    rehash(copy)
    state = torch.load(copy / "distilbert_agnews.pt")
    state["tokenizer_sha256"] = sha256(path)
    checkpoint.save_checkpoint(state, copy / "distilbert_agnews.pt")
    if engine == "int8":
        (copy / "distilbert_agnews.pt").unlink()
    with pytest.raises(LoadError, match="has 66 tokens, the model 65"):
        Classifier(copy, engine)


def test_with_int8_the_server_imports_neither_torch_nor_transformers(exported):
    code = (
        "import sys, inference.app as app\n"
        "from pathlib import Path\n"
        "found = app.Classifier(Path(sys.argv[1]), 'int8').predict(['bank'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'nncf'} & sys.modules.keys()\n"
        "print(found[0]['label'], heavy)\n"
    )
    done = run([sys.executable, "-c", code, exported], ROOT)
    assert done.stdout == "Business set()\n", done.stdout + done.stderr


def test_neither_serving_nor_exporting_calls_out(exported, news_folder, tmp_path):
    """Every look-up of a name and every connection is refused and noted, and nothing is written
    to the user's home folder, where OpenVINO's telemetry keeps an id."""
    shutil.copytree(exported, tmp_path / "c")
    code = (
        "import os, sys\n"
        "def note(event, args):\n"
        "    if event in ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.connect'):\n"
        "        os.write(2, f'CALLED {event} {args}'.encode())\n"
        "        os._exit(9)\n"
        "sys.addaudithook(note)\n"
        "from pathlib import Path\n"
        "from inference import export, model_loader\n"
        "folder = Path('c')\n"
        "model_loader.Classifier(folder, 'int8').predict(['bank'])\n"
        "export.to_int8(folder, sys.argv[1])\n"
        "import time; time.sleep(1)\n"  # it would call from a thread
    )
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-c", code, news_folder]
    done = run(command, tmp_path, HOME=str(tmp_path / "home"))
    assert done.returncode == 0 and "CALLED" not in done.stderr, done.stderr
    assert not [*(tmp_path / "home").glob("intel*")]


def test_text_files_are_utf_8_in_every_locale(exported):
    """The vocabulary of the sample's tokenizer holds letters that Latin-1 reads otherwise."""
    code = "from pathlib import Path; from inference.model_loader import *\n"
    code += "import sys; print(Classifier(Path(sys.argv[1])).predict(['caf\\u00e9 bank']))"
    answers = {
        run([sys.executable, "-X", "utf8=0", "-c", code, exported], ROOT, LC_ALL=locale).stdout
        for locale in ("C.UTF-8", "en_US.ISO-8859-1", "C")
    }
    assert len(answers) == 1 and "Business" in answers.pop()


@pytest.mark.parametrize("found", ["sample", "folder"])
def test_int8_is_not_judged_by_other_data_unless_told_so(copy, news_folder, tmp_path, found):
    command = [sys.executable, ROOT / "inference" / "export.py", "--to", "int8"]
    command += ["--checkpoint-dir", copy]
    other = shutil.copytree(news_folder, tmp_path / "other") if found == "folder" else ""
    done = run(command, tmp_path, HF_HUB_OFFLINE="1", AG_NEWS_DIR=str(other))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "trained on folder news" in done.stderr and "--data" in done.stderr


@pytest.mark.parametrize("size", [None, 0])
def test_a_running_model_does_not_change_with_its_file(copy, size):
    classifier = Classifier(copy, "int8")
    texts = [f"bank {word}" for words in WORDS.values() for word in words.split()]
    before = classifier.predict(texts[:1])
    with open(copy / INT8_BIN, "r+b") as file:  # as cp does: the same file, other bytes
        zeros = bytes((copy / INT8_BIN).stat().st_size)
        file.truncate(0)
        file.write(zeros if size is None else b"")
    assert classifier.predict(texts)[0]["label"] == before[0]["label"]
    assert classifier.predict(texts[:1]) == before


def test_a_model_whose_files_change_while_they_are_read_is_refused(copy, monkeypatch):
    engine = model_loader.load_engine(copy, "torch")

    def load(*args):
        (copy / "distilbert_agnews.pt").touch()  # a run that saves
        return engine

    monkeypatch.setattr(model_loader, "load_engine", load)
    with pytest.raises(LoadError, match="changed while"):
        Classifier(copy)


def test_bytes_on_the_command_line_that_are_no_text_are_replaced(trained):
    command = [sys.executable, "-m", "inference.model_loader", "bank \udcff"]
    assert "Business" in run(command, ROOT, CHECKPOINT_DIR=str(trained)).stdout


def test_an_unreadable_checkpoint_is_one_line(copy, monkeypatch):
    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(model_loader, "open", refuse, raising=False)
    with pytest.raises(LoadError, match="cannot read .*Permission denied"):
        Classifier(copy, "auto")


def test_a_script_started_by_path_runs_its_own_checkout(tmp_path):
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "export.py").write_text("raise SystemExit('another project')")
    for script in ("export.py", "deploy_space.py"):
        done = run([sys.executable, ROOT / "inference" / script, "--help"], tmp_path)
        assert done.returncode == 0 and "usage: " + script in done.stdout


def test_without_a_checkpoint_export_is_one_line(tmp_path):
    for to in ("int8", "hf"):
        command = [sys.executable, ROOT / "inference" / "export.py", "--to", to]
        done = run(command, tmp_path, CHECKPOINT_DIR=str(tmp_path))
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1 and f"no checkpoint at {tmp_path}" in done.stderr


@pytest.mark.parametrize(
    "argv, settings, expected",
    [
        (["uvicorn", "inference.app:app"], {}, 8),
        (["uvicorn", "inference.app:app", "--workers", "2"], {}, 4),
        (["/x/uvicorn/__main__.py", "--workers=3", "inference.app:app"], {}, 2),
        (["gunicorn", "-k", "uvicorn_worker.UvicornWorker", "-w", "2", "a:b"], {}, 4),
        (["gunicorn", "-w16", "a:b"], {}, 1),
        (["uvicorn", "inference.app:app"], {"WEB_CONCURRENCY": "4"}, 2),
        (["uvicorn", "a:b"], {"UVICORN_WORKERS": "2", "WEB_CONCURRENCY": "4"}, 4),
        (["gunicorn", "a:b"], {"GUNICORN_CMD_ARGS": "--timeout 9 -w 2"}, 4),
        (["gunicorn", "-w", "4", "a:b"], {"GUNICORN_CMD_ARGS": "-w 2"}, 2),
        (["uvicorn", "inference.app:app", "--workers", "2"], {"OMP_NUM_THREADS": "3"}, 3),
        (["uvicorn"], {"THREADS": "5", "OMP_NUM_THREADS": "3"}, 5),
        (["uvicorn"], {"OMP_NUM_THREADS": " 3,1"}, 3),
        (["pytest", "-w", "2"], {}, 8),
    ],
)
def test_threads_are_as_set_or_a_workers_share_of_the_cores(monkeypatch, argv, settings, expected):
    for name in ("THREADS", "OMP_NUM_THREADS", "WEB_CONCURRENCY", "UVICORN_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(model_loader, "cores", lambda: 8)
    assert model_loader.threads() == expected


@pytest.mark.parametrize("value", ["0", "two", "99999"])
def test_a_wrong_number_of_threads_is_one_line(trained, value):
    command = [sys.executable, "-m", "inference.model_loader", "a"]
    done = run(command, ROOT, CHECKPOINT_DIR=str(trained), THREADS=value)
    assert done.returncode == 1
    assert done.stderr == f"error: THREADS={value}: expected a whole number from 1 to 1024\n"


def test_the_model_uses_as_many_threads_as_it_was_told(exported, monkeypatch):
    openvino, compiled = model_loader.import_openvino(), []

    class Core(openvino.Core):
        def compile_model(self, *args):
            compiled.append(super().compile_model(*args))
            return compiled[-1]

    monkeypatch.setattr(openvino, "Core", Core)
    for count in (1, 2):  # OpenVINO takes no more than there are cores
        monkeypatch.setenv("THREADS", str(count))
        Classifier(exported, "int8")
        assert compiled[-1].get_property("INFERENCE_NUM_THREADS") == min(count, os.cpu_count())
    before = torch.get_num_threads()
    try:
        Classifier(exported, "torch")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_memory_does_not_grow_with_the_shapes_that_were_seen(exported):
    """OpenVINO's default keeps a kernel for each of 5,000 shapes."""
    code = (
        "import random, sys; from pathlib import Path; from inference.model_loader import *\n"
        "classifier, rng = Classifier(Path(sys.argv[1]), 'int8'), random.Random(0)\n"
        "for number in range(600):\n"
        "    classifier.scores([[2] * rng.randint(2, 128)] * rng.randint(1, 16))\n"
        "    if number in (299, 599):\n"
        "        status = Path('/proc/self/status').read_text()\n"
        "        print(int(status.split('VmRSS:')[1].split()[0]) // 1024)\n"
    )
    half, end = map(int, run([sys.executable, "-c", code, exported], ROOT).stdout.split())
    assert end < half + 20  # MiB


def test_an_export_that_is_ended_leaves_nothing_behind(trained, news_folder, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(trained, folder)
    before = set(folder.iterdir())
    command = [sys.executable, ROOT / "inference" / "export.py", "--to", "int8"]
    command += ["--data", news_folder, "--checkpoint-dir", folder]
    process = subprocess.Popen(
        [*map(str, command)], env=environment(), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and set(folder.iterdir()) == before:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "error: interrupted; run the same command again\n")
    assert set(folder.iterdir()) == before
