"""How fast serving is here: both engines against a plain pipeline endpoint, and under overload.

python -m benchmarks.bench_inference [--rounds 3] [--seconds 6] [--out FILE]

DistilBERT-base with random weights (speed does not depend on their values), texts from AG_NEWS_DIR
or else the sample. Callers are threads of one other process on the same cores: each waits for its
answer, then asks again. Every round runs every server; figures are medians over rounds.
"""

import argparse
import json
import os
import re
import selectors
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from benchmarks.bench_training import RESULTS, ROOT
from inference import export
from inference.model_loader import CHECKPOINT, ONNX, ONNX_FACTS, Classifier, sha256
from training import checkpoint, machine
from training.dataset import LABELS, SAMPLE, load_tokenizer, read_folder
from training.model import Config, NewsClassifier, packaged_backbone

CALLERS = (1, 8, 32)
SERVERS = {
    "pipeline": "benchmarks.naive_server:app",
    "torch": "inference.app:app",
    "onnx": "inference.app:app",
}
OVERLOAD = 10  # times the best rate of 200s


def make_checkpoint(folder: Path) -> None:
    """Base's shape with random weights in every form that a server here takes.

    int8 goes without its check: random weights have no accuracy to lose.
    """
    torch.manual_seed(0)
    model = NewsClassifier(Config()).eval()
    metrics = dict.fromkeys(("test_accuracy", "val_accuracy", "test_samples"), 0)
    origin = dict.fromkeys(("lr", "warmup", "global_batch_size", "total_steps", "world_size",
                            "precision", "seed", "host", "train_samples"), 0)  # fmt: skip
    origin |= {"data": "none", "model": "random weights"}
    state = {"model": model.state_dict(), "config": asdict(model.config), "labels": list(LABELS),
             "max_length": 128, "metrics": metrics, "provenance": origin}  # fmt: skip
    load_tokenizer(packaged_backbone()).save_pretrained(folder / "tokenizer")
    state["tokenizer_sha256"] = sha256(folder / "tokenizer" / "tokenizer.json")
    checkpoint.save_checkpoint(state, folder / CHECKPOINT)
    export.to_hf(folder, folder / "hf")
    export.write_int8(model, folder / ONNX)
    facts = {"checkpoint_sha256": sha256(folder / CHECKPOINT), "onnx_sha256": sha256(folder / ONNX),
             "labels": list(LABELS), "max_length": 128,
             "info": {"backbone": "random weights", "data": "none", "test_accuracy": 0,
                      "checkpoint": ""}}  # fmt: skip
    (folder / ONNX_FACTS).write_text(json.dumps(facts))


class Server:
    """One of the servers as a process of its own; `start_seconds` until its first answer."""

    def __init__(self, name: str, folder: Path, text: str):
        env = os.environ | {"CHECKPOINT_DIR": str(folder), "MODEL": str(folder / "hf"),
                            "ENGINE": name, "HF_HUB_OFFLINE": "1", "DRAIN_SECONDS": "0"}
        self.port = 17860
        command = [sys.executable, "-m", "uvicorn", SERVERS[name], "--no-access-log", "--port"]
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, str(self.port)], cwd=ROOT, env=env,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while True:
            assert self.process.poll() is None, f"the {name} server ended"
            try:
                if Caller(self.port).ask(request(text)) == 200:
                    break
            except OSError:
                pass
            time.sleep(0.02)
        self.start_seconds = time.perf_counter() - began

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def cpu_seconds(self) -> tuple[float, float]:
        """So far: of the thread that speaks HTTP, and of the model's threads and all others."""
        threads = psutil.Process(self.process.pid).threads()
        spent = {thread.id: thread.user_time + thread.system_time for thread in threads}
        http = spent.pop(self.process.pid)  # the main thread has the process's number
        return http, sum(spent.values())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def request(text: str) -> bytes:
    """A POST to /predict, made before the clock runs: callers share the server's cores here."""
    body = json.dumps({"text": text}).encode()
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Caller:
    """One connection that is kept; `ask` returns the answer's status, and leaves its `body`."""

    def __init__(self, port: int):
        self.wire = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.answer = b""

    def ask(self, request: bytes) -> int:
        self.wire.sendall(request)
        while not (status := self.receive()):
            pass
        return status

    def receive(self) -> int | None:
        """Reads once; the status if the answer is complete."""
        more = self.wire.recv(65536)
        if not more:
            raise ConnectionError("closed in mid-answer")
        self.answer += more
        head, _, self.body = self.answer.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
        if not length or len(self.body) < int(length[1]):
            return None
        self.answer = b""
        return int(head[9:12])


def percentile(values: list[float], p: float) -> float:
    return sorted(values)[min(len(values) - 1, int(p * len(values)))]


def closed_loop(
    port: int, requests: list[bytes], callers: int, seconds: float, warm_up: float = 1.0
) -> dict:
    """`callers` threads, each asking as soon as it has its answer: rate, p50 and p99 of `seconds`,
    which begin after `warm_up` seconds."""
    begin, times = time.perf_counter() + warm_up, []

    def call(number: int) -> None:
        caller = Caller(port)
        for one in requests[number::callers] * 100:
            asked = time.perf_counter()
            if asked > begin + seconds:
                break
            assert caller.ask(one) == 200
            if begin < (now := time.perf_counter()) < begin + seconds:
                times.append(now - asked)

    threads = [threading.Thread(target=call, args=[n]) for n in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"requests_per_second": len(times) / seconds, "p50_ms": 1e3 * percentile(times, 0.5),
            "p99_ms": 1e3 * percentile(times, 0.99)}  # fmt: skip


def cores_used(server: Server, load: Callable[..., dict], *args) -> dict:
    """What `load` returned, with the mean number of cores that each side was busy on meanwhile.

    Callers share the machine with the server, so what they take, it cannot have.
    """
    began, own, spent = time.perf_counter(), time.process_time(), server.cpu_seconds()
    result = load(server.port, *args)
    wall = time.perf_counter() - began
    http, model = (
        (now - then) / wall for now, then in zip(server.cpu_seconds(), spent, strict=True)
    )
    callers = (time.process_time() - own) / wall
    return result | {"cores": {"model": model, "http": http, "callers": callers}}


def overload(port: int, requests: list[bytes], rate: float, seconds: float) -> dict:
    """Requests at a fixed `rate`, whatever comes back; /health twenty times a second beside them.

    One thread and as many connections as are in flight: threads that wake each other would take
    from the server more of the cores than the requests do.
    """
    begin = time.perf_counter() + 1
    count, sent, answered = int(rate * (seconds + 1)), 0, 0
    statuses, health = Counter(), []
    free = deque()  # the longest idle first: the server hangs up on one idle for five seconds
    wires = selectors.DefaultSelector()

    def watch() -> None:
        caller = Caller(port)
        while time.perf_counter() < begin + seconds:
            asked = time.perf_counter()
            assert caller.ask(HEALTH) == 200
            if asked > begin:
                health.append(time.perf_counter() - asked)
            time.sleep(0.05)

    watching = threading.Thread(target=watch)
    watching.start()
    while answered < count:
        due = begin - 1 + sent / rate - time.perf_counter() if sent < count else None
        if due is not None and due <= 0:
            if not free:
                free.append(Caller(port))
                wires.register(free[0].wire, selectors.EVENT_READ, free[0])
            free.popleft().wire.sendall(requests[sent % len(requests)])
            sent += 1
        for key, _ in wires.select(due):
            if status := key.data.receive():
                free.append(key.data)
                answered += 1
                if begin < time.perf_counter() < begin + seconds:  # while all are offered
                    statuses[status] += 1
    watching.join()
    return {
        "offered_per_second": rate, "answered_per_second": sum(statuses.values()) / seconds,
        "ok_per_second": statuses[200] / seconds,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "health_p99_ms": 1e3 * percentile(health, 0.99),
    }  # fmt: skip


def without_http(engine: str, folder: Path, texts: list[str]) -> float:
    """The p50 in ms of the same work in this process: tokenise, one forward pass, an answer."""
    classifier, times = Classifier(folder, engine), []
    for text in texts[:200]:
        began = time.perf_counter()
        classifier.predict([text])
        times.append(time.perf_counter() - began)
    return 1e3 * percentile(times, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement")
    parser.add_argument("--out", type=Path, default=RESULTS / "inference_speed.json")
    args = parser.parse_args()
    folder = os.environ.get("AG_NEWS_DIR")
    texts = read_folder(Path(folder) if folder else SAMPLE)[1].texts
    results = {name: {"start_seconds": [], "resident_mb": [], "loops": {n: [] for n in CALLERS}}
               for name in SERVERS}  # fmt: skip
    requests = [request(text) for text in texts]
    bare, overloads = {"torch": [], "onnx": []}, []
    with tempfile.TemporaryDirectory() as place:
        make_checkpoint(Path(place))
        for number in range(args.rounds):
            for name, result in results.items():
                if name in bare:
                    bare[name].append(without_http(name, Path(place), texts))
                server = Server(name, Path(place), texts[0])
                result["start_seconds"].append(server.start_seconds)
                for callers, loops in result["loops"].items():
                    loops.append(
                        cores_used(server, closed_loop, requests, callers, args.seconds)
                    )
                    rate, p50 = loops[-1]["requests_per_second"], loops[-1]["p50_ms"]
                    print(f"round {number + 1}, {name}, {callers} callers: {rate:.1f} requests/s, "
                          f"p50 {p50:.1f} ms", flush=True)  # fmt: skip
                result["resident_mb"].append(server.resident_mb())
                if name == "onnx":
                    best = max(loops[-1]["requests_per_second"]
                               for loops in result["loops"].values())  # fmt: skip
                    rate = OVERLOAD * best
                    overloads.append(cores_used(server, overload, requests, rate, args.seconds))
                    overloads[-1]["share_of_best"] = overloads[-1]["ok_per_second"] / best
                    print("overload:", overloads[-1], flush=True)
                server.stop()
    record = {
        "script": "bench_inference",
        "command": shlex.join(["python", "-m", "benchmarks.bench_inference", *sys.argv[1:]]),
        "host": machine.host(torch.device("cpu")), "versions": machine.versions(),
        "git_commit": machine.git_commit(), "model": "DistilBERT-base, random weights",
        "texts": f"folder {Path(folder).name}" if folder else "sample",
        "rounds": args.rounds, "seconds": args.seconds, "servers": results,
        "without_http_p50_ms": bare, "overload": overloads,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, result in results.items():
        rates = [statistics.median(loop["requests_per_second"] for loop in loops)
                 for loops in result["loops"].values()]  # fmt: skip
        print(f"{name}: requests/s at {CALLERS} callers:", [round(rate, 1) for rate in rates])


if __name__ == "__main__":
    main()
