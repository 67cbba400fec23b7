"""The real loading code against a Hub on loopback, and without one: pytest tests/test_hub.py"""

import json
import shutil
import socket
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from hub_stand_in import HubStandIn
from ranks import ROOT, environment

import dataset

LOAD = """
import json, sys, time
began = time.monotonic()
import dataset, model, utils
utils.hub_answers()
answer = {}
for name, find in (("model", model.find_backbone), ("data", dataset.read_source)):
    try:
        answer[name] = [str(part) for part in find(sys.argv[1])][-2:]
    except (dataset.DataError, model.ModelError) as error:
        answer[name] = str(error)
answer["seconds"] = time.monotonic() - began
print(json.dumps(answer))
"""


def load(choice, cache, endpoint):
    """What find_backbone and read_source say in a fresh process whose Hub is `endpoint`."""
    env = environment(HF_HOME=str(cache), HF_ENDPOINT=endpoint)
    del env["HF_HUB_OFFLINE"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, choice], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub_folder(tiny_backbone, news_folder, tmp_path_factory):
    """distilbert-base-uncased (tiny) with its language-model head, and AG News in Parquet."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_backbone, folder / "models" / "distilbert-base-uncased")
    data = folder / "datasets" / "fancyzhx" / "ag_news" / "data"
    data.mkdir(parents=True)
    for split, news in zip(("train", "test"), dataset.read_folder(news_folder), strict=True):
        table = pyarrow.table({"text": news.texts, "label": news.labels})
        pyarrow.parquet.write_table(table, data / f"{split}-00000-of-00001.parquet")
    (data.parent / "README.md").write_text("# AG News\n")
    return folder


def test_model_and_data_come_from_the_hub_and_later_from_the_cache(hub_folder, tmp_path):
    expected = {
        "model": ["distilbert-base-uncased", "from the Hugging Face cache or Hub"],
        "data": ["fancyzhx/ag_news", "from the Hugging Face cache or Hub"],
    }
    with HubStandIn(hub_folder) as hub:
        first = load("auto", tmp_path, hub.url)
        assert any("model.safetensors" in line for line in hub.asked)
        assert any("train-00000-of-00001.parquet" in line for line in hub.asked)
    again = load("auto", tmp_path, hub.url)  # nobody answers there any more
    for answer in (first, again):
        assert {name: answer[name] for name in expected} == expected


def test_training_runs_on_what_the_hub_gave(hub_folder, tmp_path):
    with HubStandIn(hub_folder) as hub:
        env = environment(HF_HOME=str(tmp_path), HF_ENDPOINT=hub.url)
        del env["HF_HUB_OFFLINE"]
        command = [sys.executable, ROOT / "training" / "train_single.py", "--max-steps", 1]
        command += ["--checkpoint-dir", tmp_path / "c", "--max-eval-samples", 8]
        done = subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert "model: distilbert-base-uncased" in done.stdout
    assert "data: fancyzhx/ag_news" in done.stdout


def silent_server():
    """A server that accepts and never answers."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


@pytest.mark.parametrize("kind", ["refuses", "never answers"])
def test_a_hub_that_cannot_be_reached_is_noticed_within_10_seconds(tmp_path, kind):
    with silent_server() as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "refuses":
            server.close()
        began = time.monotonic()
        answer = load("auto", tmp_path, url)
        assert answer["seconds"] < 10 and time.monotonic() - began < 15
    assert answer["model"][0] == "packaged"
    assert answer["data"] == ["sample", "no AG_NEWS_DIR, no Kaggle input, not cached, and the Hub "
                              "does not answer"]  # fmt: skip


def test_a_named_hub_source_that_cannot_be_reached_is_one_line(tmp_path):
    with silent_server() as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        answer = load("ag_news", tmp_path, url)  # as a model, a name that no Hub has either
    assert answer["seconds"] < 10
    assert "'ag_news' is neither in the Hugging Face cache nor" in answer["model"]
    assert "fancyzhx/ag_news is neither in the Hugging Face cache nor" in answer["data"]
    assert "\n" not in answer["model"] + answer["data"]
