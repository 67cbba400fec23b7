"""The real loading code against a Hub on loopback, and without one: pytest tests/test_hub.py"""

import json
import os
import shutil
import socket
import ssl
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from fake_hub import COMMIT, fake_hub
from huggingface_hub import constants
from ranks import ROOT, run
from safetensors.torch import load_file

import ag_news
import machine
from ag_news import SourceError
from model import PACKAGED, PACKAGED_MODULE, ModelError, find_backbone, load_backbone

LOAD = """
import json, sys, time
import ag_news, machine, model
began = time.monotonic()  # after the imports, which take long on a busy machine
machine.set_offline_mode()
answer = {}
for name, find in (("model", model.find_backbone), ("data", ag_news.find_data)):
    try:
        answer[name] = [part for part in find(sys.argv[1]) if isinstance(part, str)][:2]
    except (ag_news.SourceError, model.ModelError) as error:
        answer[name] = str(error)
answer["seconds"] = time.monotonic() - began
print(json.dumps(answer))
"""


def load(choice, cache, endpoint):
    """What find_backbone and find_data say in a fresh process whose Hub is `endpoint`."""
    online = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    done = run([sys.executable, "-c", LOAD, choice], ROOT, **online)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub_folder(tiny_backbone, news_folder, tmp_path_factory):
    """distilbert-base-uncased (tiny) with its language-model head, and AG News in Parquet."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_backbone, folder / "models" / "distilbert-base-uncased")
    data = folder / "datasets" / "fancyzhx" / "ag_news" / "data"
    data.mkdir(parents=True)
    for split, news in zip(("train", "test"), ag_news.read_folder(news_folder), strict=True):
        table = pyarrow.table({"text": news.texts, "label": news.labels})
        pyarrow.parquet.write_table(table, data / f"{split}-00000-of-00001.parquet")
    (data.parent / "README.md").write_text("# AG News\n")
    return folder


def test_model_and_data_come_from_the_hub_and_later_from_the_cache(hub_folder, tmp_path):
    expected = {
        "model": ["distilbert-base-uncased", "from the Hugging Face cache or Hub"],
        "data": ["fancyzhx/ag_news", "from the Hugging Face cache or Hub"],
    }
    with fake_hub(hub_folder) as hub:
        first = load("auto", tmp_path, hub.url)
        assert any("model.safetensors" in line for line in hub.asked)
        assert any("train-00000-of-00001.parquet" in line for line in hub.asked)
    again = load("auto", tmp_path, hub.url)  # nobody answers there any more
    for answer in (first, again):
        assert {name: answer[name] for name in expected} == expected


def test_a_hub_whose_certificate_python_cannot_check_is_left_to_the_hubs_client(monkeypatch):
    def ask(*args, **kwargs):
        raise urllib.error.URLError(reason)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(urllib.request, "urlopen", ask)
    reason = ssl.SSLCertVerificationError("unable to get local issuer")
    assert machine.set_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "0"
    reason = ssl.SSLError("WRONG_VERSION_NUMBER")  # a proxy that speaks plain HTTP
    assert not machine.set_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("kind", ["another protocol", "no host name"])
def test_a_hub_that_does_not_speak_http_is_offline(monkeypatch, kind):
    def babble(server):
        with server.accept()[0] as wire:
            wire.recv(1000)
            wire.sendall(b"220 mail.example ESMTP\r\n")

    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", "http://exa mple.com" if kind == "no host name" else url)
        if kind == "another protocol":
            threading.Thread(target=babble, args=[server]).start()
        assert machine.set_offline_mode(seconds=5) is False
    assert not raised


@pytest.mark.parametrize("kind", ["refuses", "never answers"])
def test_a_hub_that_cannot_be_reached_is_noticed_within_10_seconds(tmp_path, kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "refuses":
            server.close()
        answer = load("auto", tmp_path, url)
    assert answer["seconds"] < 10
    assert answer["model"][0] == "packaged"
    assert answer["data"][0] == "sample" and "the Hub did not answer" in answer["data"][1]


def test_a_named_hub_source_that_cannot_be_reached_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        answer = load("ag_news", tmp_path, url)  # as a model, a name that no Hub has either
    assert answer["seconds"] < 10
    assert "ag_news is not cached and the Hub does not answer" in answer["model"]
    assert "fancyzhx/ag_news is not in the Hugging Face cache" in answer["data"]
    assert "\n" not in answer["model"] + answer["data"]


# Models in the cache

SHORT, LONG = "distilbert-base-uncased", "distilbert/distilbert-base-uncased"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache in this process, without a Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def add_to_cache(cache, name, folder, without=()):
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns(*without))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("choice", ["auto", SHORT, LONG])
@pytest.mark.parametrize("cached_as", [SHORT, LONG])
def test_a_model_is_found_in_the_cache_under_either_name(cache, tiny_backbone, cached_as, choice):
    snapshot = add_to_cache(cache, cached_as, tiny_backbone)
    assert find_backbone(choice)[0] == snapshot


def test_a_model_of_the_same_name_but_another_owner_is_not_taken(cache, tiny_backbone):
    add_to_cache(cache, LONG, tiny_backbone)
    with pytest.raises(ModelError, match="not cached"):
        find_backbone("somebody/distilbert-base-uncased")


@pytest.mark.parametrize("other", ["", LONG])
@pytest.mark.parametrize("without", [["model.safetensors"], ["tokenizer.json", "vocab.txt"]])
def test_an_incomplete_cache_is_never_used(cache, tiny_backbone, without, other):
    pytest.importorskip(PACKAGED_MODULE)
    add_to_cache(cache, SHORT, tiny_backbone, without)
    if other:  # a complete copy under the other name is used
        complete = add_to_cache(cache, other, tiny_backbone)
        assert find_backbone("auto")[0] == complete
        return
    _, source, why = find_backbone("auto")
    assert source == PACKAGED and without[0] in why and "\n" not in why
    with pytest.raises(ModelError, match=f"^[^\n]*{without[0]}[^\n]*--model packaged[^\n]*$"):
        find_backbone(SHORT)


def find_online(home, hub, *choices):
    """find_backbone's folders in a fresh process with that HF_HOME and Hub."""
    code = "import sys, model\nfor name in sys.argv[1:]: print(model.find_backbone(name)[0])"
    online = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    done = run([sys.executable, "-c", code, *choices], ROOT, **online)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def test_the_hub_sends_weights_of_torch_save_only_where_there_are_no_others(
    tiny_backbone, tmp_path
):
    both, old = (tmp_path / "models" / "team" / name for name in ("both", "old"))
    shutil.copytree(tiny_backbone, both)
    torch.save(load_file(both / "model.safetensors"), both / "pytorch_model.bin")
    shutil.copytree(both, old, ignore=shutil.ignore_patterns("model.safetensors"))
    with fake_hub(tmp_path) as hub:
        for folder in find_online(tmp_path, hub, "team/both", "team/old"):
            load_backbone(folder)
    sent = {line.partition(" ")[2] for line in hub.asked if line.endswith(".bin")}
    assert sent == {f"/team/old/resolve/{COMMIT}/pytorch_model.bin"}


def test_a_cache_that_cannot_be_written_is_still_read(tiny_backbone, tmp_path):
    shutil.copytree(tiny_backbone, tmp_path / "models" / LONG)
    home = tmp_path / "home"
    snapshot = add_to_cache(home / "hub", LONG, tiny_backbone, ["tokenizer_config.json"])
    (home / "hub" / ".locks").write_text("")  # where the missing file's download needs a folder
    with fake_hub(tmp_path) as hub:
        assert find_online(home, hub, "auto") == [snapshot]
    assert any("resolve" in line for line in hub.asked)


# Data in the cache


@pytest.mark.parametrize("name", ["fancyzhx/ag_news", "ag_news"])
@pytest.mark.parametrize("kept_by", ["huggingface_hub", "datasets"])
def test_data_is_found_in_a_cache_that_cannot_be_written(
    cache, news_folder, monkeypatch, name, kept_by
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
    repo = cache / f"datasets--{name.replace('/', '--')}"
    if kept_by == "huggingface_hub":
        folder = repo / "snapshots" / COMMIT
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        (cache / ".locks").write_text("")  # where a download needs a folder
    else:
        folder = cache / "datasets" / name.replace("/", "___") / "default" / "0.0.0" / COMMIT
    (folder / "data").mkdir(parents=True)
    expected = ag_news.read_folder(news_folder)
    for split, examples in zip(("train", "test"), expected, strict=True):
        table = pyarrow.table({"text": examples.texts, "label": examples.labels})
        if kept_by == "huggingface_hub":
            path = folder / "data" / f"{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(table, path)
        else:
            path = folder / f"ag_news-{split}.arrow"
            with pyarrow.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
    if (name, kept_by) == ("ag_news", "datasets"):  # or load_dataset("/my/own/ag_news")
        with pytest.raises(SourceError, match="not in the Hugging Face cache"):
            ag_news.read_hub()
        monkeypatch.setattr(ag_news, "SIZES", tuple(len(split.texts) for split in expected))
    assert ag_news.read_hub() == expected
    path.write_bytes(path.read_bytes()[:1000])  # what was cut short is not taken
    with pytest.raises(SourceError, match="not in the Hugging Face cache"):
        ag_news.read_hub()


def test_a_download_that_fails_is_one_line_with_its_reason(hub_folder, tmp_path):
    with fake_hub(tmp_path) as hub:  # a Hub without data sets
        missing = load("ag_news", tmp_path, hub.url)["data"]
    assert "RepositoryNotFoundError" in missing
    (tmp_path / "full" / "hub").mkdir(parents=True)
    (tmp_path / "full" / "hub" / ".locks").write_text("")  # where a download needs a folder
    with fake_hub(hub_folder) as hub:
        unwritable = load("ag_news", tmp_path / "full", hub.url)["data"]
    assert "Error" in unwritable and ".locks" in unwritable
    assert "\n" not in missing + unwritable
