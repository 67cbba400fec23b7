"""The API over real HTTP, with good input and with any other: pytest tests/test_api.py"""

import asyncio
import gzip
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ranks import ROOT, run
from server import GUNICORN, UVICORN, process, server
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace

import inference.app
from inference.model_loader import Classifier, LoadError

HEADLINE = "profit and shares of the bank"
JSON = {"Content-Type": "application/json"}
BATCH = {"texts": ["bank " * 3000] * 64}  # 0.9 MiB


@pytest.fixture(scope="module")
def url(trained):
    with server(trained, ENGINE="torch", ALLOW_ORIGINS="https://A.example, https://b.example") as u:
        yield u


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=20) as client:
        yield client


def metric(client, line: str) -> float:
    found = [x for x in client.get("/metrics").text.splitlines() if x.startswith(line + " ")]
    return float(found[0].rpartition(" ")[2]) if found else 0


# Good input


def test_predict_answers_with_label_confidence_and_all_scores(http, trained):
    answer = http.post("/predict", json={"text": HEADLINE}).json()
    assert answer["label"] == "Business"
    assert list(answer["scores"]) == ["World", "Sports", "Business", "Sci/Tech"]
    assert answer["confidence"] == max(answer["scores"].values()) == answer["scores"]["Business"]
    assert sum(answer["scores"].values()) == pytest.approx(1)
    assert answer["truncated"] is False and answer["out_of_vocabulary"] is False
    expected = Classifier(trained, "torch").predict([HEADLINE])[0]
    assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-6)


def test_a_batch_is_answered_in_order_and_like_single_texts(http):
    texts = ["goal and striker", "virus in the browser", "troops at the border", HEADLINE] * 16
    answers = http.post("/predict/batch", json={"texts": texts}).json()["predictions"]
    assert [a["label"] for a in answers] == ["Sports", "Sci/Tech", "World", "Business"] * 16
    for text, answer in list(zip(texts, answers, strict=True))[:4]:
        alone = http.post("/predict", json={"text": text}).json()
        assert alone["scores"] == pytest.approx(answer["scores"], abs=1e-5)


def test_truncated_is_true_exactly_when_tokens_were_dropped(http):
    # one token a word; [CLS] and [SEP] leave 126 of 128
    for words, expected in ((125, False), (126, False), (127, True), (3000, True)):
        answer = http.post("/predict", json={"text": "bank " * words}).json()
        assert answer["truncated"] is expected
    cut, whole = (
        http.post("/predict", json={"text": "bank " * 126 + tail}).json()["scores"]
        for tail in ("goal " * 500, "")
    )
    assert cut == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(
    "text, unknown",
    [
        ("a" * 20_000, True),
        ("a" * 200 + ", " + "b" * 200 + ".", True),  # punctuation is no word
        ("xyzzy \u4efb\U0001f3c6", True),
        ("xyzzy bank", False),
    ],
)
def test_a_text_without_a_known_word_is_marked(http, text, unknown):
    answer = http.post("/predict", json={"text": text}).json()
    assert answer["out_of_vocabulary"] is unknown and answer["truncated"] is False


def test_health_says_what_is_served(http):
    answer = http.get("/health")
    assert answer.status_code == 200
    model = answer.json()["model"]
    assert answer.json()["status"] == "healthy"
    assert model["engine"] == "torch" and model["device"] in ("cpu", "cuda")
    assert model["backbone"].startswith("folder tiny") and model["data"].startswith("folder news")
    assert 0 < model["test_accuracy"] <= 1
    assert re.fullmatch("[0-9a-f]{12}", model["checkpoint"])


def test_metrics_count_by_route_and_do_not_grow_with_what_clients_invent(http):
    def lines():
        return http.get("/metrics").text.splitlines()

    http.post("/predict", json={"text": HEADLINE})
    for path in ("/a", "/b", "/predict/x"):
        assert http.get(path).status_code == 404
    lines()  # /metrics counts itself too
    before, count = lines(), 'requests_total{route="/predict",status="200"}'
    answered = metric(http, count)
    for n in range(50):
        http.get(f"/nothing/{n}")
        http.post("/predict", json={"text": f"bank {n}"})
    assert len(lines()) == len(before)
    assert metric(http, count) - answered == 50


# Manners


def test_head_is_answered_like_get_and_no_slash_is_redirected(http):
    for path in ("/", "/health", "/metrics", "/docs", "/source"):
        got, head = http.get(path), http.head(path)
        assert got.status_code == head.status_code == 200 and not head.content
        assert got.headers["content-type"] == head.headers["content-type"]
    for path in ("/predict/", "/predict/batch/", "/health/"):
        assert http.post(path, json={"text": "bank"}).status_code in (404, 405)


def test_the_docs_come_without_a_network(http):
    assert "DistriNews" in http.get("/openapi.json").json()["info"]["title"]
    page = http.get("/docs").text
    links = re.findall(r"""(?:src|href|url)(?:=|: )["']([^"']+)""", page)
    assert "openapi.json" in links and len(links) == 4
    for link in links:  # relative, so they hold behind a path prefix, too
        assert not link.startswith(("http", "/"))
        assert link == "data:," or http.get(f"/{link}").status_code == 200


def test_other_sites_may_ask_if_they_are_named(http):
    for origin, allowed in (("https://b.example",) * 2, ("https://c.example", None)):
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        before = http.options("/predict", headers=headers)
        answer = http.post("/predict", json={"text": " "}, headers={"Origin": origin})
        for one in (before, answer):
            assert one.headers.get("access-control-allow-origin") == allowed


def test_a_program_that_embeds_the_app_is_told_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    monkeypatch.setattr(inference.app, "service", inference.app.Service())
    with pytest.raises(LoadError, match="no checkpoint"), TestClient(inference.app.app):
        pass


def test_the_app_works_when_another_one_mounts_it(trained, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_DIR", str(trained))
    monkeypatch.setattr(inference.app, "service", inference.app.Service())
    outer = FastAPI()
    outer.mount("/news", inference.app.app)

    async def go():
        transport = httpx.ASGITransport(outer)  # as Starlette, it runs no lifespan of a mounted app
        async with httpx.AsyncClient(transport=transport, base_url="http://x/news") as client:
            answers = [
                await client.post("/predict", json={"text": "x" * size})
                for size in (9, 30_000, 300_000)
            ]
            health, metrics = await client.get("/health"), await client.get("/metrics")
            assert (await client.get("/openapi.json")).json()["servers"] == [{"url": "."}]
        below = httpx.ASGITransport(inference.app.app, root_path="/p")  # and the path without it
        async with httpx.AsyncClient(transport=below, base_url="http://x") as client:
            answers.append(await client.post("/predict", json={"text": "x" * 300_000}))
        inference.app.service.stop()
        return [answer.status_code for answer in (*answers, health)], metrics.text

    statuses, metrics = asyncio.run(go())
    assert statuses == [200, 422, 413, 413, 200]
    assert 'requests_total{route="/predict",status="413"} 1.0' in metrics


def test_clients_that_give_up_do_not_start_the_model_again(trained, monkeypatch):
    class Slow(Classifier):
        def __init__(self, *args):
            loads.append(args)
            time.sleep(1)
            super().__init__(*args)

    loads, service = [], inference.app.Service()
    monkeypatch.setenv("CHECKPOINT_DIR", str(trained))
    monkeypatch.setattr(inference.app, "Classifier", Slow)

    async def go():
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(service.start(), 0.1)
        await service.start()
        service.stop()

    asyncio.run(go())
    assert len(loads) == 1


def test_the_tokenizer_does_not_stop_the_event_loop(trained):
    classifier = Classifier(trained, "torch")
    letters = Tokenizer(WordPiece({"[UNK]": 0, "q": 1, "##q": 2}, unk_token="[UNK]"))
    letters.pre_tokenizer = Whitespace()
    classifier.tokenizer = letters
    text, turns = " ".join(["q" * 100] * 198), 0  # the slowest of 20,000 letters: 0.2 s
    thread = threading.Thread(target=lambda: [classifier.encode(text) for _ in range(5)])
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 50  # 5 if Python's lock is kept meanwhile


def test_each_request_may_have_an_event_loop_of_its_own(trained, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_DIR", str(trained))
    monkeypatch.setattr(inference.app, "service", inference.app.Service())
    client = TestClient(inference.app.app, raise_server_exceptions=False)  # as FastAPI shows it
    for _ in range(2):
        assert client.post("/predict", json={"text": "bank"}).status_code == 200
    monkeypatch.setattr(Classifier, "encode", lambda *_: 1 / 0)
    answer = client.post("/predict", json={"text": "bank"})
    assert answer.status_code == 500 and answer.json().keys() == {"detail"}


def test_java_s_upgrade_to_http_2_does_not_lose_the_body(http):
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEA"}
    answer = http.post("/predict", json={"text": HEADLINE}, headers=headers)
    assert answer.json()["label"] == "Business"


# Bad input

MARK = "zqxjkvbp"  # in what is sent; never in an answer


@pytest.mark.parametrize(
    "path, body, says",
    [
        ("/predict", b'{"text": ""}', "text: has no letter or digit"),
        ("/predict", b'{"text": " \\t\\n"}', "text: has no letter or digit"),
        ("/predict", b'{"text": "\\u200b\\u200d\\ufeff"}', "text: has no letter or digit"),
        ("/predict", b'{"text": "\\u0000\\u001b\\u202e\\u00ad"}', "has no letter or digit"),
        ("/predict", b'{"text": "\\u0301\\ufe0f?_"}', "text: has no letter or digit"),
        ("/predict", b"{}", "text: Field required"),
        ("/predict", b'{"text": 7}', "text: Input should be a valid string"),
        ("/predict", b'{"text": "\\ud800' + MARK.encode() + b'"}', "text: "),
        ("/predict", b'{"text": "' + MARK.encode() * 2501 + b'"}', "at most 20000"),
        ("/predict", b'{"text": "' + b"x" * 263_000 + b'"}', "body: over 256 KiB"),
        ("/predict%0A", b'{"text": "' + b"x" * 263_000 + b'"}', "body: over 256 KiB"),
        ("/predict", '{"text": "\u2200"}'.encode("utf-16"), "body: expected UTF-8"),
        ("/predict", '{"text": "caf\u00e9"}'.encode("latin-1"), "body: expected UTF-8"),
        ("/predict", MARK.encode(), "body: JSON decode error"),
        ("/predict", b"", "body: Field required"),
        ("/predict", b"\xff\xfe\x00" + MARK.encode(), "body: "),
        ("/predict", b"[" * 9_000, "body: cannot be read as JSON"),
        ("/predict", b"[" * 60_000, "body: too many values"),
        ("/predict", b'{"text": ' * 5_000, "body: too many values"),
        ("/predict", b'{"text": NaN}', "text: Input should be a valid string"),
        ("/predict", b'{"text": ' + b"9" * 9_000 + b"}", ""),
        ("/predict/batch", b'{"texts": []}', "texts: List should have at least 1 item"),
        ("/predict/batch", json.dumps({"texts": ["a"] * 65}).encode(), "at most 64 items"),
        ("/predict/batch", b'{"texts": ["a", " "]}', "texts.1: has no letter or digit"),
        # while the parser made an object of each of these, the server did nothing else
        ("/predict/batch", b'{"texts": [' + b"[]," * 300_000 + b"[]]}", "too many values"),
        ("/predict/batch", b'{"texts": ["x"]' + b', "k": 0' * 100_000 + b"}", "too many values"),
        ("/predict/batch", b'{"texts": [' + b'"\\\\",' * 100_000 + b'"x"]}', "too many values"),
        ("/predict/batch", b'{"texts": ["' + b"x" * 1_100_000 + b'"]}', "over 1024 KiB"),
    ],
)
def test_bad_input_gets_a_line_that_says_what_and_where(http, path, body, says):
    chunked = (body[i : i + 10_000] for i in range(0, len(body), 10_000))  # no Content-Length
    for content in (body, chunked):
        answer = http.post(path, content=content, headers=JSON)
        assert answer.status_code == (413 if "KiB" in says else 422)
        assert answer.json().keys() == {"detail"}
        assert says in answer.json()["detail"]
        assert len(answer.content) < 200 and MARK not in answer.text


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_called_json_is_told_so(http, kind):
    headers = {"Content-Type": kind} if kind else {}
    answer = http.post("/predict", content=b'{"text": "bank"}', headers=headers)
    assert answer.status_code == 422 and "Content-Type: application/json" in answer.json()["detail"]


def test_a_compressed_body_is_refused_as_such(http):
    body = gzip.compress(b'{"text": "bank"}')
    answer = http.post("/predict", content=body, headers=JSON | {"Content-Encoding": "gzip"})
    assert answer.status_code == 415 and "Content-Encoding" in answer.json()["detail"]


def test_the_longest_text_fits_however_it_is_escaped(http):
    for odd in ('"', "\\", '\\"', "{[,:]}", ", "):  # what is syntax elsewhere is text here
        body = json.dumps({"texts": [f"goal {odd * (8_000 // len(odd))}"] * 64})
        assert http.post("/predict/batch", content=body, headers=JSON).status_code == 200
    body = json.dumps({"text": "goal " + "\U0001f3c6" * 19_995})
    assert len(body) > 200_000
    assert http.post("/predict", content=body, headers=JSON).status_code == 200


def test_the_first_bad_text_of_a_batch_ends_its_validation():
    with pytest.raises(ValidationError) as caught:
        inference.app.BatchRequest.model_validate({"texts": ["." * 16_000] * 64})
    assert caught.value.error_count() == 1


def test_large_bodies_that_fill_the_memory_do_not_stop_small_ones():
    middleware = inference.app.LoadSheddingMiddleware(None)
    middleware.unread_bytes = inference.app.MAX_UNREAD_BYTES + 1
    sizes = {size: middleware.refusal({"headers": []}, 2**18, size) for size in (9_000, 90_000)}
    assert sizes[9_000] is None and sizes[90_000].status_code == 429


def test_a_refusal_after_the_whole_body_comes_at_once(http):
    body = iter([b" " * 260_000, b" " * 10_000])  # too long in its last piece
    t0 = time.perf_counter()
    answer = http.post("/predict", content=body, headers=JSON | {"Connection": "close"})
    assert answer.status_code == 413 and time.perf_counter() - t0 < 1.5


@pytest.mark.parametrize("version, headers", [("1.0", {}), ("1.1", {"Connection": "close"})])
def test_a_client_that_closes_after_its_request_gets_the_refusal(url, version, headers):
    host, port = url.removeprefix("http://").split(":")
    for _ in range(5):  # nginx is such a client; of 413s on 3 MiB none arrived
        wire = HTTPConnection(host, int(port), timeout=10)
        wire._http_vsn_str = f"HTTP/{version}"
        wire.request("POST", "/predict", b" " * 3_000_000, JSON | headers)
        assert wire.getresponse().status == 413


def test_control_characters_and_emoji_beside_words_are_text(http):
    for text in ("bank\x00 shares", "\U0001f3c6 goal", "\u200bgoal"):
        assert http.post("/predict", json={"text": text}).status_code == 200


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
LIKE_OURS = st.builds(lambda key, v: {key: v}, st.sampled_from(["text", "texts"]), ANY_JSON)
BATCHES = st.builds(lambda texts: {"texts": texts}, st.lists(st.text(), max_size=70))
ANY_BODY = st.binary(max_size=300) | (ANY_JSON | LIKE_OURS | BATCHES).map(
    lambda value: json.dumps([MARK, value] if isinstance(value, list) else value).encode()
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(body=ANY_BODY, path=st.sampled_from(["/predict", "/predict/batch"]))
def test_no_body_makes_a_server_error(http, body, path):
    answer = http.post(path, content=body, headers=JSON)
    assert answer.status_code in (200, 413, 422), answer.text
    if answer.status_code != 200:
        assert answer.json().keys() == {"detail"} and MARK not in answer.text


def test_schemathesis_finds_nothing_with_all_its_checks(url, tmp_path):
    flags = "--checks all --seed 1 --max-examples 40 --no-color".split()
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *flags]
    done = run(command, tmp_path, 200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "Tested: 4" in done.stdout  # all four: an empty run would be no proof


def test_garbage_and_endless_headers_on_the_wire_do_no_harm(url, http):
    host, port = url.removeprefix("http://").split(":")
    for garbage in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"POST /predict HTTP/1.1\r\n" * 50,
        b"GET /" + b"a" * 2**20,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2**18,
    ):
        with socket.create_connection((host, int(port)), timeout=5) as wire:
            try:
                wire.sendall(garbage)
            except OSError:  # refused before it was all sent
                pass
    assert http.get("/health").status_code == 200


def test_more_half_requests_than_the_soft_limit_of_descriptors_do_no_harm(exported):
    limited = ["bash", "-c", 'ulimit -Sn 128; exec "$@"', "bash", *UVICORN]
    with server(exported, command=limited) as url:
        address = url.removeprefix("http://").split(":")
        wires = [socket.create_connection((address[0], int(address[1]))) for _ in range(300)]
        for wire in wires:
            wire.sendall(b"POST /predict HTTP/1.1\r\nHost:")
        assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        for wire in wires:
            wire.close()


def test_half_a_body_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(inference.app, "MAX_BODY_SECONDS", 0.1)
    first, sent = iter([{"type": "http.request", "body": b"{", "more_body": True}]), []

    async def receive():
        return next(first, None) or await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    asyncio.run(inference.app.app(scope, receive, send))
    assert sent[0]["status"] == 408


# Under load


def test_overload_gets_429_at_once_and_health_answers_meanwhile(exported):
    async def go(url):
        async def ask(path, body):
            answer = await client.post(path, json=body)
            return answer, time.perf_counter()

        # by its own default the client keeps a connection just as long as the server does
        limits = httpx.Limits(max_connections=400, keepalive_expiry=1)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
            bodies = [{"text": f"bank {n}"} for n in range(300)]
            tasks = [asyncio.create_task(ask("/predict", body)) for body in bodies]
            health = []
            while len(health) < 20 or not any(task.done() for task in tasks):
                t0 = time.perf_counter()
                assert (await client.get("/health")).status_code == 200
                health.append(time.perf_counter() - t0)
            singles = await asyncio.gather(*tasks)
            batches = await asyncio.gather(*(ask("/predict/batch", BATCH) for _ in range(12)))
            return singles, batches, health

    with server(exported, app="tests.slow_app:app") as url:
        singles, batches, health = asyncio.run(go(url))
    statuses = [answer.status_code for answer, _ in singles]
    # 128 are inside at once; what is answered while the others still arrive comes on top
    assert set(statuses) == {200, 429} and 128 <= statuses.count(200) < 250
    # no 429 waits until the bodies before it are tokenized: two are inside, each for four batches
    statuses = [answer.status_code for answer, _ in batches]
    assert statuses.count(200) == 2 and statuses.count(429) == 10
    times = {status: [t for a, t in batches if a.status_code == status] for status in (200, 429)}
    assert max(times[429]) < min(times[200])
    for answer, _ in singles + batches:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json() == {"detail": "the queue is full"}
    assert sorted(health)[len(health) // 2] < 0.4  # one forward pass takes 0.5, 128 rows take 4


def test_the_work_of_clients_that_hang_up_is_dropped(exported):
    with server(exported, app="tests.slow_app:app") as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(6):  # 64 rows are four batches of half a second
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{url}/predict/batch", json={"texts": ["bank"] * 64}, timeout=0.3)
            t0 = time.perf_counter()
            assert client.post("/predict", json={"text": "bank"}).status_code == 200
            # all of them would take 12 s; one batch may run already, and this one is its own
            assert time.perf_counter() - t0 < 4
            assert metric(client, 'requests_total{route="/predict/batch",status="499"}') == 6
            assert metric(client, 'requests_total{route="/predict/batch",status="200"}') == 0
            assert metric(client, "admitted_rows") == 0


# Starting and stopping


def test_workers_share_their_metrics(exported, tmp_path):
    folder = str(tmp_path / "metrics")
    killed = tmp_path / "metrics" / "gauge_livesum_4999999.db"  # a worker that was, not long ago
    killed.parent.mkdir()
    killed.touch()
    with server(exported, "--workers", "2", PROMETHEUS_MULTIPROC_DIR=folder) as url:
        for _ in range(20):
            assert httpx.post(f"{url}/predict", json={"text": "bank"}).status_code == 200
        for _ in range(8):  # of one worker or the other: each connection is a new one
            with httpx.Client(base_url=url) as client:
                assert metric(client, 'requests_total{route="/predict",status="200"}') == 20
        assert not killed.exists()
        (tmp_path / "metrics" / "counter_99999.db").touch()  # a worker killed while it made this
        answer = httpx.get(f"{url}/metrics")
        assert answer.status_code == 503 and "cannot be read" in answer.json()["detail"]


@pytest.mark.slow
def test_a_worker_that_cannot_be_replaced_leaves_the_others_at_work(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "c")
    command = [*UVICORN, "--workers", "2"]
    with process(folder, command=command, ENGINE="torch") as (url, master):
        while (folder / "server.log").read_text().count("startup complete") < 2:
            time.sleep(0.1)
        children = Path(f"/proc/{master.pid}/task/{master.pid}/children").read_text().split()
        workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        folder.rename(tmp_path / "away")
        os.kill(int(workers[0]), signal.SIGKILL)
        for _ in range(10):
            assert httpx.post(f"{url}/predict", json={"text": "bank"}).status_code == 200
            time.sleep(1)
        assert master.poll() is None
        (tmp_path / "away").rename(folder)


def test_empty_settings_are_no_settings(exported):
    names = ("ENGINE", "PROMETHEUS_MULTIPROC_DIR", "ALLOW_ORIGINS", "THREADS", "SOURCE_URL")
    with server(exported, **dict.fromkeys(names, "")) as url:
        assert httpx.get(f"{url}/metrics").status_code == 200
    assert not list(ROOT.glob("*.db"))


@pytest.mark.parametrize(
    "workers, variable, value, says",
    [
        (1, "CHECKPOINT_DIR", "/nowhere", "make demo"),
        (2, "CHECKPOINT_DIR", "/nowhere", "make demo"),
        (1, "ENGINE", "tpu", "expected auto, torch, int8"),
        (2, "ALLOW_ORIGINS", "example.org", "such as https://example.org, not example.org"),
        (1, "ALLOW_ORIGINS", "https://a.example:443", "not https://a.example:443"),
        (1, "ALLOW_ORIGINS", "https://a.example?x", "not https://a.example?x"),
        (1, "PROMETHEUS_MULTIPROC_DIR", "/dev/null", "PROMETHEUS_MULTIPROC_DIR=/dev/null"),
    ],
)
def test_what_cannot_be_served_ends_with_one_line(trained, workers, variable, value, says):
    env = {"CHECKPOINT_DIR": str(trained)} | {variable: value}
    done = run([*UVICORN, "--workers", workers, "inference.app:app"], ROOT, **env)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("INFO: ")]
    assert done.returncode != 0
    assert len(errors) == 1 and errors[0].startswith("error: ") and says in errors[0]


def test_a_program_that_imports_the_server_survives_a_wrong_setting(trained):
    code = "try:\n    import inference.app\nexcept Exception as error:\n    print(error)"
    done = run([sys.executable, "-c", code], ROOT, ALLOW_ORIGINS="example.org")
    assert done.returncode == 0 and "not example.org" in done.stdout, done.stderr


def test_a_program_that_starts_the_server_in_a_process_survives_its_failure(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import multiprocessing, uvicorn\n"
        "def serve():\n    uvicorn.run('inference.app:app', port=0)\n"
        "if __name__ == '__main__':\n"
        "    server = multiprocessing.get_context('spawn').Process(target=serve)\n"
        "    server.start()\n    server.join()\n    print('status', server.exitcode)\n"
    )
    done = run([sys.executable, script], tmp_path, CHECKPOINT_DIR="/nowhere")
    assert done.returncode == 0 and done.stdout.endswith("status 3\n"), done.stderr


@pytest.mark.parametrize(
    "command, whole_group",
    [
        (UVICORN, False),
        pytest.param([*UVICORN, "--workers", "2"], False, marks=pytest.mark.slow),
        ([*UVICORN, "--workers", "2"], True),
        pytest.param([*GUNICORN, "-w", "2"], False, marks=pytest.mark.slow),
        ([*GUNICORN, "-w", "2"], True),
    ],
    ids=["uvicorn", "uvicorn 2", "uvicorn 2, group", "gunicorn 2", "gunicorn 2, group"],
)
def test_sigterm_answers_what_was_accepted(exported, command, whole_group):
    async def go(url, master):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            tasks = [
                asyncio.create_task(client.post("/predict", json={"text": f"bank {n}"}))
                for n in range(40)
            ]
            await asyncio.sleep(1)
            assert not all(task.done() for task in tasks)
            (os.killpg if whole_group else os.kill)(master.pid, signal.SIGTERM)
            return [answer.status_code for answer in await asyncio.gather(*tasks)]

    with process(exported, command=command, app="tests.slow_app:app") as (url, master):
        assert asyncio.run(go(url, master)) == [200] * 40
        assert master.wait(20) in (0, -signal.SIGTERM)
