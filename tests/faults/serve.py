"""Thousands of requests, far too many, and clients that mean harm, against the real server.

python -m tests.faults.serve [--checkpoint-dir checkpoints] [--engine torch|int8] [--out FILE]

Needs a trained checkpoint, as `make demo` leaves one; texts from AG_NEWS_DIR or else the sample.
"""

import asyncio
import json
import multiprocessing
import os
import random
import re
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks.figures import record_header, write_record
from inference.model_loader import CHECKPOINTS, Classifier, LoadError
from tests.server import process
from training.ag_news import SAMPLE, read_folder

TOLERANCE = {"torch": 1e-3, "int8": 1e-2}  # the shape of a batch changes the rounding of some texts
ANOTHER_TEXT = 0.1  # off by more than rounding can: the scores of another text
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CLIENTS = 32


def post(body: bytes) -> bytes:
    return (
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


class Client:
    """One keep-alive connection. httpx would spend more time on a request than the server."""

    def __init__(self, port: int):
        self.port, self.writer = port, None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        # the server has closed a connection that was idle for five seconds
        if self.writer is None or self.writer.is_closing() or self.reader.at_eof():
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            self.writer.write(request)
            head = await self.reader.readuntil(b"\r\n\r\n")
            body = await self.reader.readexactly(int(re.search(rb"length: (\d+)", head)[1]))
        except (OSError, EOFError):
            self.writer.close()
            raise
        return int(head[9:12]), body


def resident_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 2**20


def p99_ms(seconds: list[float]) -> float:
    return 1e3 * float(np.percentile(seconds, 99))


@asynccontextmanager
async def health_asked(port: int):
    """/health asked twenty times a second; yields the seconds it took."""
    seconds = []

    async def watch():
        client = Client(port)
        while True:
            t0 = time.perf_counter()
            assert (await client.ask(HEALTH))[0] == 200
            seconds.append(time.perf_counter() - t0)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(watch())
    yield seconds
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def load(port, pid, texts, expected, count, tolerance) -> dict:
    """`count` requests; every answer against the one computed without a server."""
    turns, statuses, answered, wrong, memory = iter(range(count)), Counter(), Counter(), [], {}

    async def work():
        client = Client(port)
        for turn in turns:
            place = turn % len(texts)
            status, body = await client.ask(post(json.dumps({"text": texts[place]}).encode()))
            statuses[str(status)] += 1
            answered[turn] += 1
            if status == 200:
                scores = json.loads(body)["scores"]
                off = max(abs(scores[k] - v) for k, v in expected[place]["scores"].items())
                if off > tolerance:
                    wrong.append([turn, off])
            if turn == 1000:
                memory["after_1000_mb"] = resident_mb(pid)

    t0 = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return {
        "requests": count,
        "seconds": time.perf_counter() - t0,
        "statuses": dict(statuses),
        "answered_once": sum(times == 1 for times in answered.values()),
        "wrong": sorted(wrong, key=lambda one: -one[1])[:20],
        "wrong_count": len(wrong),
        **memory,
        "at_the_end_mb": resident_mb(pid),
    }


async def ask_for(port, requests, clients, seconds, rate=None) -> tuple[Counter, float]:
    """(how often which status, seconds): each client asks again once it is answered and, with a
    `rate`, once its share of that many requests a second is due."""
    statuses, t0 = Counter(), time.perf_counter()

    async def work(number):
        client, turn = Client(port), 0
        while time.perf_counter() < t0 + seconds:
            request = requests[(number + turn * clients) % len(requests)]
            statuses[(await client.ask(request))[0]] += 1
            turn += 1
            if rate:
                due = t0 + (turn * clients + number) / rate
                await asyncio.sleep(max(0, due - time.perf_counter()))

    await asyncio.gather(*map(work, range(clients)))
    return statuses, time.perf_counter() - t0


def offer(*args) -> tuple[Counter, float]:
    return asyncio.run(ask_for(*args))


async def too_many(port, requests, seconds) -> dict:
    """Ten times the best rate, offered by another process; then how soon the best rate is back."""
    statuses, spent = await ask_for(port, requests, CLIENTS, min(6, seconds))
    best = statuses[200] / spent
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        async with health_asked(port) as health:
            statuses, spent = await asyncio.get_running_loop().run_in_executor(
                pool, offer, port, requests, 400, seconds, 10 * best
            )
    after, spent_after = await ask_for(port, requests, CLIENTS, 1)
    return {
        "offered_per_second": 10 * best,
        "answered_per_second": statuses.total() / spent,
        "ok_per_second": statuses[200] / spent,
        "health_p99_ms": p99_ms(health),
        "statuses": {str(status): n for status, n in sorted(statuses.items())},
        "best_per_second": best,
        "seconds": seconds,
        "first_second_after": after[200] / spent_after,
    }


async def hostile(port, requests, bodies) -> dict:
    """Slow and idle and half-closed connections, garbage, fuzzed bodies; honest clients beside."""
    chance, statuses = random.Random(0), Counter()
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(1000)]
    slow = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(200)]

    async def drip():  # half a header, and half a body, byte by byte
        for number, writer in enumerate(slow):
            head = post(b"x" * 60_000)[:-60_000]
            writer.write(head[:-2] + b"X-Slow: " if number % 2 else head)
        while True:
            for number, writer in enumerate(slow):
                if not writer.is_closing():
                    writer.write(b"X" if number % 2 else b" ")
            await asyncio.sleep(0.2)

    async def raw(content: bytes, half_close: bool) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(content)
        if half_close:
            writer.write_eof()
        try:
            answer = await asyncio.wait_for(reader.read(4096), 1)
            return answer[9:12].decode() or "closed"
        except (OSError, TimeoutError):
            return "no answer"
        finally:
            writer.close()

    any_json = st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
    text = st.builds(lambda text: {"text": text}, st.text())
    any_body = st.binary(max_size=300) | (any_json | text).map(lambda x: json.dumps(x).encode())
    fuzzed, silent = [], list(HealthCheck)

    @seed(0)
    @settings(max_examples=bodies, deadline=None, database=None, suppress_health_check=silent)
    @given(any_body)
    def fuzz(body):
        fuzzed.append(body)

    await asyncio.to_thread(fuzz)
    dripping = asyncio.create_task(drip())
    async with health_asked(port) as health:
        for request in requests[:200]:
            statuses[await raw(request, half_close=True)] += 1
        for _ in range(500):  # garbage, behind a request or alone
            junk = chance.randbytes(chance.randrange(1, 3000))
            before = chance.choice(requests) if chance.random() < 0.5 else b""
            statuses[await raw(before + junk, half_close=False)] += 1
        client = Client(port)
        for body in fuzzed:
            statuses[str((await client.ask(post(body)))[0])] += 1
    dripping.cancel()
    for writer in [*slow, *(writer for _, writer in idle)]:
        writer.close()
    return {
        "idle": len(idle),
        "slow": len(slow),
        "half_closed": 200,
        "garbage": 500,
        "fuzzed": len(fuzzed),
        "statuses": dict(sorted(statuses.items())),
        "server_errors": sum(n for status, n in statuses.items() if status.startswith("5")),
        "health_p99_ms": p99_ms(health),
        "health_asked": len(health),
        "honest_request_after": (await Client(port).ask(requests[0]))[0],
    }


async def going_down(master, port, requests) -> dict:
    """SIGTERM while 16 clients are at work: all that was asked before it is answered."""
    asked = []  # when, and the status of the answer

    async def work(number):
        client = Client(port)
        try:
            for request in requests[number::16] * 1000:
                entry = [time.perf_counter(), None]
                asked.append(entry)
                entry[1] = (await client.ask(request))[0]
        except (OSError, EOFError):  # closed, or nobody listens any more
            pass

    tasks = [asyncio.create_task(work(n)) for n in range(16)]
    await asyncio.sleep(1)
    t0 = time.perf_counter()
    master.terminate()
    await asyncio.sleep(0.1)
    try:
        health = str((await Client(port).ask(HEALTH))[0])
    except ConnectionRefusedError:
        health = "refused"
    exit_status = await asyncio.to_thread(master.wait, 60)
    seconds = time.perf_counter() - t0
    await asyncio.gather(*tasks)
    before = [status for when, status in asked if when < t0]
    return {
        "clients": len(tasks),
        "asked": len(before),
        "answered": before.count(200),
        "health_while_draining": health,
        "exit_status": exit_status,
        "seconds": seconds,
    }


async def attack(port, master, texts, expected, args) -> dict:
    requests = [post(json.dumps({"text": text}).encode()) for text in texts]
    tolerance, record = TOLERANCE[args.engine], {}
    for name, work in (
        ("load", load(port, master.pid, texts, expected, args.requests, tolerance)),
        ("overload", too_many(port, requests, args.overload_seconds)),
        ("hostile", hostile(port, requests, args.bodies)),
        ("going_down", going_down(master, port, requests)),
    ):
        record[name] = await work
        print(name, json.dumps(record[name]), flush=True)
    return record


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", type=Path, default=CHECKPOINTS)
    parser.add_argument("--engine", choices=list(TOLERANCE), default="torch")
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--out", type=Path)
    args, header = parser.parse_args(), record_header()
    folder = os.environ.get("AG_NEWS_DIR")
    texts = read_folder(Path(folder) if folder else SAMPLE)[1].texts
    try:
        classifier = Classifier(args.checkpoint_dir, args.engine)
    except LoadError as error:
        sys.exit(f"error: {error}")
    expected = [classifier.predict([text])[0] for text in texts]
    checkpoints = args.checkpoint_dir.resolve()
    with process(checkpoints, "--no-access-log", ENGINE=args.engine) as (url, master):
        found = asyncio.run(attack(urlsplit(url).port, master, texts, expected, args))
    header |= {"engine": args.engine, "model": classifier.info["backbone"]}
    header["texts"] = f"folder {Path(folder).name}" if folder else "sample"
    if args.out:
        write_record(args.out, header | found)
    good = (
        all(off < ANOTHER_TEXT for _, off in found["load"]["wrong"])
        and found["load"]["answered_once"] == args.requests
        and set(found["overload"]["statuses"]) <= {"200", "429"}
        and not found["hostile"]["server_errors"]
        and found["going_down"]["answered"] == found["going_down"]["asked"]
    )
    sys.exit(not good)


if __name__ == "__main__":
    main()
