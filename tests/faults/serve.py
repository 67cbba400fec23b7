"""Thousands of requests, ten times too many, and clients that mean harm, against the real server.

python -m tests.faults.serve [--checkpoint-dir checkpoints] [--requests 30000] [--out FILE]

Needs a trained checkpoint, as `make demo` leaves one; texts from AG_NEWS_DIR or else the sample.
With the torch engine, which is exact: int8 rounds by what shares its batch, and so could hide an
answer that was another text's.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks.bench_inference import HEALTH, Caller, closed_loop, overload, percentile, request
from inference.model_loader import CHECKPOINTS, Classifier, LoadError
from tests.ranks import ROOT
from tests.server import wait_until_healthy
from training import machine
from training.dataset import SAMPLE, read_folder

DRAIN_SECONDS = 1


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def watched(port: int):
    """/health asked twenty times a second; yields the seconds it took."""
    taken, over = [], threading.Event()

    def watch():
        caller = Caller(port)
        while not over.wait(0.05):
            began = time.perf_counter()
            assert caller.ask(HEALTH) == 200
            taken.append(time.perf_counter() - began)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()


def load(port: int, pid: int, texts: list[str], expected: list[dict], count: int) -> dict:
    """`count` requests from 32 callers; every answer against the one computed without a server."""
    turns, lock = iter(range(count)), threading.Lock()
    statuses, wrong, answered = Counter(), [], Counter()
    memory = {}

    def call():
        caller = Caller(port)
        while True:
            with lock:
                turn = next(turns, None)
            if turn is None:
                return
            place = turn % len(texts)
            status = caller.ask(request(texts[place]))
            statuses[status] += 1
            answered[turn] += 1
            if status == 200:
                got = json.loads(caller.body)
                off = max(abs(got["scores"][k] - v) for k, v in expected[place]["scores"].items())
                if off > 1e-3:
                    wrong.append([turn, off])
            if turn == 1000:
                memory["after_1000_mb"] = resident_mb(pid)

    began = time.perf_counter()
    threads = [threading.Thread(target=call) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "requests": count, "seconds": time.perf_counter() - began,
        "statuses": {str(k): v for k, v in statuses.items()},
        "answered_once": sum(v == 1 for v in answered.values()), "wrong": wrong[:20],
        "wrong_count": len(wrong), **memory, "at_the_end_mb": resident_mb(pid),
    }  # fmt: skip


def too_many(port: int, requests: list[bytes], seconds: float) -> dict:
    """Ten times the best rate for a while; then how soon the best rate is back."""
    best = closed_loop(port, requests, 32, 6)["requests_per_second"]
    during = overload(port, requests, 10 * best, seconds)
    after = closed_loop(port, requests, 32, 1, warm_up=0)["requests_per_second"]
    return during | {"best_per_second": best, "seconds": seconds, "first_second_after": after}


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def hostile(port: int, requests: list[bytes], bodies: int) -> dict:
    """Slow and idle and half-closed connections, garbage, fuzzed bodies; honest callers beside."""
    chance, statuses = random.Random(0), Counter()
    idle = [connect(port) for _ in range(1000)]
    slow = [connect(port) for _ in range(200)]
    over = threading.Event()

    def drip():  # half a header, and half a body, byte by byte
        while not over.wait(0.2):
            for number, wire in enumerate(slow):
                try:
                    wire.send(b"X" if number % 2 else b" ")
                except OSError:
                    pass

    for number, wire in enumerate(slow):
        wire.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Slow: " if number % 2 else
                     b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 60000\r\n\r\n")  # fmt: skip
    thread = threading.Thread(target=drip)
    thread.start()
    with watched(port) as taken:
        for one in requests[:200]:  # asks, and closes its own direction at once
            wire = connect(port)
            wire.sendall(one)
            wire.shutdown(socket.SHUT_WR)
            statuses[wire.recv(4096)[9:12].decode() or "closed"] += 1
            wire.close()
        for _ in range(500):  # garbage, behind a request or alone
            wire = connect(port)
            junk = chance.randbytes(chance.randrange(1, 3000))
            wire.sendall((chance.choice(requests) if chance.random() < 0.5 else b"") + junk)
            wire.settimeout(0.2)
            try:
                statuses[wire.recv(4096)[9:12].decode() or "closed"] += 1
            except OSError:
                statuses["no answer"] += 1
            wire.close()
        caller = [Caller(port)]

        @seed(0)
        @settings(max_examples=bodies, deadline=None, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(st.one_of(
            st.binary(max_size=300),
            st.recursive(st.none() | st.booleans() | st.floats() | st.text(),
                         lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
            .map(lambda value: json.dumps(value).encode()),
            st.text().map(lambda text: json.dumps({"text": text}).encode()),
        ))  # fmt: skip
        def fuzz(body):
            head = (f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n")  # fmt: skip
            try:
                status = caller[0].ask(head.encode() + body)
            except ConnectionError:
                caller[0], status = Caller(port), 0
            statuses[str(status)] += 1

        fuzz()
    over.set()
    thread.join()
    for wire in (*idle, *slow):
        wire.close()
    return {
        "idle": len(idle), "slow": len(slow), "half_closed": 200, "garbage": 500,
        "fuzzed": bodies, "statuses": dict(sorted(statuses.items())),
        "server_errors": sum(n for status, n in statuses.items() if status.startswith("5")),
        "health_p99_ms": 1e3 * percentile(taken, 0.99), "health_asked": len(taken),
        "honest_request_after": Caller(port).ask(requests[0]),
    }  # fmt: skip


def going_down(process: subprocess.Popen, port: int, requests: list[bytes]) -> dict:
    """SIGTERM while 16 callers are at work: all that they ask before the drain ends is answered."""
    asked = []  # when, and the status of the answer

    def call(number: int) -> None:
        try:
            caller = Caller(port)
            for one in requests[number::16] * 100:
                mine = [time.perf_counter(), None]
                asked.append(mine)
                mine[1] = caller.ask(one)
        except OSError:  # closed, or nobody listens any more
            pass

    threads = [threading.Thread(target=call, args=[n]) for n in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    process.terminate()
    told = time.perf_counter()
    time.sleep(0.3)
    health = Caller(port).ask(HEALTH)
    exit_status = process.wait(60)
    seconds = time.perf_counter() - told
    for thread in threads:
        thread.join()
    before = [status for when, status in asked if when < told + DRAIN_SECONDS - 0.05]
    return {"callers": len(threads), "asked": len(before), "answered": before.count(200),
            "health_while_draining": health, "exit_status": exit_status,
            "seconds": seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint-dir", type=Path, default=CHECKPOINTS)
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = os.environ.get("AG_NEWS_DIR")
    texts = read_folder(Path(folder) if folder else SAMPLE)[1].texts
    try:
        classifier = Classifier(args.checkpoint_dir, "torch")
    except LoadError as error:
        sys.exit(f"error: {error}")
    expected = [classifier.predict([text])[0] for text in texts]
    requests = [request(text) for text in texts]
    record = {
        "script": "faults_serve", "host": machine.host(torch.device("cpu")),
        "versions": machine.versions(), "git_commit": machine.git_commit(), "engine": "torch",
        "texts": f"folder {Path(folder).name}" if folder else "sample",
        "model": classifier.info["backbone"],
        "command": f"python -m tests.faults.serve --requests {args.requests} --bodies "
                   f"{args.bodies}",
    }  # fmt: skip
    command = [sys.executable, "-m", "uvicorn", "inference.app:app", "--port", "0"]
    env = os.environ | {"CHECKPOINT_DIR": str(args.checkpoint_dir.resolve()), "ENGINE": "torch",
                        "DRAIN_SECONDS": str(DRAIN_SECONDS)}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        with open(log, "w") as file:
            process = subprocess.Popen([*command, "--no-access-log"], cwd=ROOT, env=env,
                                       stdout=file, stderr=file)  # fmt: skip
        port = int(wait_until_healthy(process, log).rpartition(":")[2])
        for name, work in (
            ("load", lambda: load(port, process.pid, texts, expected, args.requests)),
            ("overload", lambda: too_many(port, requests, args.overload_seconds)),
            ("hostile", lambda: hostile(port, requests, args.bodies)),
            ("going_down", lambda: going_down(process, port, requests)),
        ):
            record[name] = work()
            print(name, json.dumps(record[name]), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    down = record["going_down"]
    ok = (not record["load"]["wrong_count"] and not record["hostile"]["server_errors"]
          and down["answered"] == down["asked"] and not down["exit_status"])  # fmt: skip
    sys.exit(not ok)


if __name__ == "__main__":
    main()
