"""The API over real HTTP, with good input and with any other: pytest tests/test_api.py"""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ROOT, environment
from server import server, wait_until_healthy

import inference.app
from inference.model_loader import Classifier

HEADLINE = "profit and shares of the bank"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def url(trained):
    with server(trained, ENGINE="torch") as address:
        yield address


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=20) as client:
        yield client


# Good input


def test_predict_answers_with_label_confidence_and_all_scores(http, trained):
    answer = http.post("/predict", json={"text": HEADLINE}).json()
    assert answer["label"] == "Business"
    assert list(answer["scores"]) == ["World", "Sports", "Business", "Sci/Tech"]
    assert answer["confidence"] == max(answer["scores"].values()) == answer["scores"]["Business"]
    assert sum(answer["scores"].values()) == pytest.approx(1)
    assert answer["truncated"] is False
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


def test_health_says_what_is_served(http, trained):
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
    before = lines()
    for n in range(50):
        http.get(f"/nothing/{n}")
        http.post("/predict", json={"text": f"bank {n}"})
    after = lines()
    assert len(after) == len(before)
    count = 'requests_total{route="/predict",status="200"} '
    old, new = (next(x for x in text if x.startswith(count)) for text in (before, after))
    assert float(new.removeprefix(count)) - float(old.removeprefix(count)) == 50


def test_the_docs_and_the_page_are_there(http):
    assert "DistriNews" in http.get("/openapi.json").json()["info"]["title"]
    assert http.get("/docs").status_code == 200
    assert http.get("/").headers["content-type"].startswith("text/html")


# Bad input

MARK = "zqxjkvbp"  # in what is sent; never in an answer


@pytest.mark.parametrize(
    "path, body, status, says",
    [
        ("/predict", b'{"text": ""}', 422, "text: is blank"),
        ("/predict", b'{"text": " \\t\\n"}', 422, "text: is blank"),
        ("/predict", b"{}", 422, "text: Field required"),
        ("/predict", b'{"text": 7}', 422, "text: Input should be a valid string"),
        ("/predict", b'{"text": null}', 422, "text: Input should be a valid string"),
        ("/predict", b'{"text": "\\ud800' + MARK.encode() + b'"}', 422, "text: "),
        ("/predict", b'{"text": "' + MARK.encode() * 2501 + b'"}', 422, "at most 20000"),
        ("/predict", b'{"text": "' + b"x" * 66_000 + b'"}', 413, "body: over 64 KiB"),
        ("/predict", b'{"text": "' + b"x" * 1_000_000 + b'"}', 413, "body: over 64 KiB"),
        ("/predict", MARK.encode(), 422, "body: JSON decode error"),
        ("/predict", b"", 422, "body: Field required"),
        ("/predict", b"\xff\xfe\x00" + MARK.encode(), 422, "body: "),
        ("/predict", b"[" * 60_000, 422, "body: cannot be read as JSON"),
        ("/predict", b'{"text": ' * 5_000, 422, "body: cannot be read as JSON"),
        ("/predict", b'{"text": NaN}', 422, "text: Input should be a valid string"),
        ("/predict", b'{"text": 1e999999}', 422, "text: Input should be a valid string"),
        ("/predict", b'{"text": ' + b"9" * 50_000 + b"}", 422, ""),
        ("/predict/batch", b'{"texts": []}', 422, "texts: List should have at least 1 item"),
        ("/predict/batch", json.dumps({"texts": ["a"] * 65}).encode(), 422, "at most 64 items"),
        ("/predict/batch", b'{"texts": ["a", " "]}', 422, "texts.1: is blank"),
        ("/predict/batch", b'{"texts": "a"}', 422, "texts: Input should be a valid list"),
        ("/predict/batch", b'{"texts": ["' + b"x" * 1_100_000 + b'"]}', 413, "over 1024 KiB"),
    ],
)
def test_bad_input_gets_a_line_that_says_what_and_where(http, path, body, status, says):
    answer = http.post(path, content=body, headers=JSON)
    assert answer.status_code == status
    assert answer.json().keys() == {"detail"}
    assert says in answer.json()["detail"]
    assert len(answer.content) < 200 and MARK not in answer.text


def test_chunks_over_the_limit_are_refused_too(http):
    chunks = (b"x" * 10_000 for _ in range(7))  # no Content-Length: 70,000 bytes in all
    answer = http.post("/predict", content=chunks, headers=JSON)
    assert answer.status_code == 413 and answer.json().keys() == {"detail"}


@pytest.mark.parametrize("kind", [None, "text/plain", "application/xml", "multipart/form-data"])
def test_another_content_type_is_refused(http, kind):
    headers = {"Content-Type": kind} if kind else {}
    answer = http.post("/predict", content=b'{"text": "bank"}', headers=headers)
    assert answer.status_code == 422 and answer.json().keys() == {"detail"}


def test_nul_and_emoji_are_text_like_any_other(http):
    for text in ("bank\x00 shares", "\U0001f3c6 goal", "\x00"):
        assert http.post("/predict", json={"text": text}).status_code == 200


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def check_any(answer, sent: bytes):
    assert answer.status_code in (200, 413, 422), answer.text
    if answer.status_code != 200:
        assert answer.json().keys() == {"detail"}
        assert MARK not in answer.text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(body=st.binary(max_size=300), path=st.sampled_from(["/predict", "/predict/batch"]))
def test_no_bytes_make_a_server_error(http, body, path):
    check_any(http.post(path, content=body, headers=JSON), body)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    value=ANY_JSON | st.builds(lambda v: {"text": v}, ANY_JSON)
    | st.builds(lambda v: {"texts": v}, ANY_JSON | st.lists(st.text(), max_size=70)),
    path=st.sampled_from(["/predict", "/predict/batch"]),
)  # fmt: skip
def test_no_json_makes_a_server_error(http, value, path):
    body = json.dumps([MARK, value] if isinstance(value, list) else value).encode()
    check_any(http.post(path, content=body, headers=JSON), body)


def test_schemathesis_finds_nothing_with_all_its_checks(url, tmp_path):
    schemathesis = [sys.executable, "-m", "schemathesis.cli"]
    command = [*schemathesis, "run", f"{url}/openapi.json", "--checks", "all", "--seed", "1",
               "--max-examples", "40", "--no-color"]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "Tested: 4" in done.stdout  # all four: an empty run would be no proof


def test_garbage_on_the_wire_does_no_harm(url, http):
    host, port = url.removeprefix("http://").split(":")
    for garbage in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /predict HTTP/1.1\r\n" * 50):
        with socket.create_connection((host, int(port)), timeout=5) as wire:
            wire.sendall(garbage)
    assert http.get("/health").status_code == 200


# Under load


class Slow(Classifier):
    """The real thing, half a second later."""

    def scores(self, rows):
        time.sleep(1)
        return super().scores(rows)


@pytest.fixture
def slow(trained, monkeypatch):
    """A server in this process whose model takes a second."""
    monkeypatch.setenv("CHECKPOINT_DIR", str(trained))
    monkeypatch.setenv("ENGINE", "torch")
    monkeypatch.setattr(inference.app, "Classifier", Slow)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        live = uvicorn.Server(uvicorn.Config(inference.app.app, log_level="warning"))
        thread = threading.Thread(target=live.run, args=[[listener]])
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        while not (live.started and httpx.get(f"{url}/health").status_code == 200):
            time.sleep(0.02)
        yield url
        live.should_exit = True
        thread.join(20)


def test_overload_gets_429_with_retry_after_and_health_answers_meanwhile(slow):
    async def go():
        limits = httpx.Limits(max_connections=400)
        async with httpx.AsyncClient(base_url=slow, limits=limits, timeout=60) as client:
            tasks = [asyncio.create_task(client.post("/predict", json={"text": f"bank {n}"}))
                     for n in range(300)]  # fmt: skip
            await asyncio.sleep(1.5)  # the callers share this process: until all have asked
            waits = []
            for _ in range(20):
                began = time.perf_counter()
                assert (await client.get("/health")).status_code == 200
                waits.append(time.perf_counter() - began)
            assert not all(task.done() for task in tasks)  # the model was busy all along
            return await asyncio.gather(*tasks), waits

    answers, waits = asyncio.run(go())
    statuses = [answer.status_code for answer in answers]
    # 128 wait and up to 16 run; what the model takes in the first moments comes on top
    assert set(statuses) == {200, 429} and 128 <= statuses.count(200) <= 200
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json() == {"detail": "the queue is full"}
    assert np.median(waits) < 0.1  # one forward pass takes 1


# Starting and stopping


def start(checkpoints, **extra):
    command = [sys.executable, "-m", "uvicorn", "inference.app:app", "--port", "0"]
    return subprocess.run(
        command, cwd=ROOT, env=environment(CHECKPOINT_DIR=str(checkpoints), **extra),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_without_a_usable_checkpoint_the_server_exits_with_one_line(tmp_path, trained):
    subprocess.run(["cp", "-r", trained, tmp_path / "cut"], check=True)
    file = tmp_path / "cut" / "distilbert_agnews.pt"
    file.write_bytes(file.read_bytes()[:-2000])
    for folder, extra, says in (
        (tmp_path / "none", {}, "make demo"),
        (tmp_path / "cut", {"ENGINE": "torch"}, "is corrupted or not"),
        (tmp_path / "none", {"ENGINE": "tpu"}, "expected auto, torch or onnx"),
    ):
        done = start(folder, **extra)
        errors = [line for line in done.stderr.splitlines() if not line.startswith("INFO: ")]
        assert done.returncode == 1
        assert len(errors) == 1 and errors[0].startswith("error: ") and says in errors[0]


def test_sigterm_finishes_what_was_accepted_and_health_says_draining(trained):
    command = [sys.executable, "-m", "uvicorn", "inference.app:app", "--port", "0"]
    env = environment(CHECKPOINT_DIR=str(trained), DRAIN_SECONDS="1", ENGINE="torch")
    log = trained / "drain.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
    with httpx.Client(base_url=wait_until_healthy(process, log)) as client:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        answer = client.get("/health")
        assert answer.status_code == 503 and "draining" in answer.json()["detail"]
        assert client.post("/predict", json={"text": HEADLINE}).status_code == 200
    assert process.wait(10) == 0


def test_a_second_sigterm_ends_at_once(trained):
    command = [sys.executable, "-m", "uvicorn", "inference.app:app", "--port", "0"]
    env = environment(CHECKPOINT_DIR=str(trained), DRAIN_SECONDS="60", ENGINE="torch")
    log = trained / "second.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
    wait_until_healthy(process, log)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(2) == 128 + signal.SIGTERM
