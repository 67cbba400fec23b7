"""How fast serving is here: both engines against what a user would pick instead, and overload.

python -m benchmarks.bench_inference [--quick] [--record]

DistilBERT-base with random weights (speed does not depend on their values), texts from AG_NEWS_DIR
or else the sample. The clients are wrk, on the same cores as the server: each waits for its answer,
then asks again. Every round runs every server. The record, one flat row a measurement, goes to
runs/, with --record to benchmarks/results/.
"""

import contextlib
import json
import math
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import psutil
import torch
from tqdm import tqdm

from benchmarks.bench_training import make_backbone
from benchmarks.figures import ROOT, record_header, write_record
from inference import export
from inference.model_loader import CHECKPOINT, INT8_XML, Classifier, threads, torch_engine
from training.ag_news import SAMPLE, SourceError, read_folder
from training.model import Config

RECORD = "inference_speed.json"
CLIENTS = (1, 8, 32)
OVERLOAD = 10  # times the best rate of successful responses
CONNECTIONS = 1024  # that an overload may use: more than the server lets wait
INFINITY = "0.0.78"
OURS = ("int8", "torch")
SERVERS = ("int8", "torch", "pipeline", "litserve_1", "litserve_2", "infinity")


class BenchError(Exception):
    """What keeps a benchmark from running; one line that names the remedy."""


def make_checkpoint(folder: Path) -> None:
    """Base's shape, after one step from random weights, in every form that a server here takes.

    int8 is not compared: such weights have no accuracy to lose.
    """
    flags = ["--model", make_backbone(folder / "backbone"), "--data", "sample", "--max-steps", 1]
    flags += ["--global-batch-size", 8, "--max-eval-samples", 8, "--checkpoint-dir", folder]
    command = [sys.executable, ROOT / "training" / "train_single.py", *flags]
    subprocess.run([*map(str, command)], cwd=folder, check=True)
    export.to_hf(folder)
    rows = [torch.randint(1000, 30000, (1, 52)).numpy() for _ in range(8)]
    export.write_int8(export.load_model(folder)[0], rows, folder / INT8_XML)
    export.write_metadata(folder, folder / CHECKPOINT, torch_engine(folder))


def infinity_python(quick: bool) -> tuple[Path | None, str]:
    """(its interpreter, "") or (None, why not). Its pins conflict with ours: it gets a venv."""
    venv = ROOT / "runs" / "infinity"
    if not (venv / "installed").exists():
        if quick:
            return None, "not installed, and --quick installs nothing"
        # its BetterTransformer is gone from later ones of transformers and optimum
        wanted = f"infinity-emb[server,torch]=={INFINITY} transformers<4.49 optimum<2".split()
        wanted.append(f"torch=={version('torch').partition('+')[0]}")
        pip = [venv / "bin" / "pip", "install", *wanted]
        for command in ([sys.executable, "-m", "venv", "--clear", venv], pip):
            if subprocess.run([*map(str, command)]).returncode:
                return None, f"{shlex.join(map(str, command))} failed"
        (venv / "installed").touch()
    return venv / "bin" / "python", ""


class Server:
    """One of the servers as processes of its own; `start_seconds` until its first answer."""

    def __init__(self, name: str, folder: Path, texts: list[str], infinity: Path | None):
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            port = chosen.getsockname()[1]
        hf, workers = folder / "hf", 2 if name == "litserve_2" else 1
        settings = {"CHECKPOINT_DIR": folder, "ENGINE": name, "MODEL": hf, "HF_HUB_OFFLINE": 1}
        settings |= {"WORKERS": workers, "PORT": port, "DO_NOT_TRACK": 1}
        settings["OMP_NUM_THREADS"] = max(1, threads() // workers)
        uvicorn = [sys.executable, "-m", "uvicorn", "--no-access-log", "--port", port]
        command, path = [*uvicorn, "--http", "h11", "inference.app:app"], "predict"
        if name == "pipeline":
            command = [*uvicorn, "benchmarks.naive_server:app"]
        elif name.startswith("litserve"):
            command = [sys.executable, "-m", "benchmarks.litserve_server"]
        elif name == "infinity":
            command, path = [infinity, "-m", "infinity_emb.cli", "v2", "--model-id", hf], "classify"
            command += ["--served-model-name", "m", "--engine", "torch", "--device", "cpu"]
            command += ["--port", port]
        self.name, self.base = name, f"http://127.0.0.1:{port}"
        self.url, self.bodies = f"{self.base}/{path}", folder / f"{name}.jsonl"
        lines = [
            json.dumps({"text": t} if path == "predict" else {"model": "m", "input": [t]})
            for t in texts
        ]
        self.bodies.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.log = folder / f"{name}.log"
        self.t0 = time.perf_counter()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*map(str, command)],
                cwd=ROOT,
                env=os.environ | {key: str(value) for key, value in settings.items()},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_it_answers(self) -> None:
        body = self.bodies.read_text(encoding="utf-8").splitlines()[0]
        headers = {"Content-Type": "application/json"}
        while not self.answers(body, headers):
            self.start_seconds = time.perf_counter() - self.t0
            if self.process.poll() is not None or self.start_seconds > 180:
                lines = self.log.read_text(errors="replace").strip().splitlines() or [""]
                reason = next((x for x in reversed(lines) if "Error: " in x), lines[-1])
                raise BenchError(f"the {self.name} server did not start: {reason}")
            time.sleep(0.02)
        self.start_seconds = time.perf_counter() - self.t0
        self.start_mb = self.resident_mb()

    def answers(self, body: str, headers: dict) -> bool:
        try:
            how = {"timeout": 60, "trust_env": False}  # no proxy is asked for 127.0.0.1
            return httpx.post(self.url, content=body, headers=headers, **how).is_success
        except httpx.TransportError:
            return False

    def resident_mb(self) -> float:
        """Of all its processes; memory that they share counts once."""
        main = psutil.Process(self.process.pid)
        others = sum(child.memory_full_info().uss for child in main.children(recursive=True))
        return (main.memory_info().rss + others) / 2**20

    def wrk(self, clients: int, seconds: float, *script: float) -> dict:
        """Figures of wrk.lua."""
        command = ["wrk", "--threads", 1, "--connections", clients, "--timeout", "60s"]
        command += ["--duration", f"{seconds:g}s", "--script", ROOT / "benchmarks" / "wrk.lua"]
        command += [self.url, "--", self.bodies, *script]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])

    def settle(self) -> None:
        """Waits while the server computes what clients have asked that are gone by now."""

        def busy() -> float:
            main, seconds = psutil.Process(self.process.pid), 0.0
            for process in (main, *main.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    seconds += sum(process.cpu_times()[:2])
            return seconds

        for _ in range(60):
            before = busy()
            time.sleep(0.5)
            if busy() - before < 0.1:
                return

    def closed_loop(self, clients: int, seconds: float) -> dict:
        """`clients` that each ask as soon as they have their answer; the more, the longer."""
        self.wrk(clients, 1)  # warm-up
        self.settle()
        figures = self.wrk(clients, seconds * max(1, clients / 4))
        self.settle()
        statuses, broken = figures.pop("statuses"), figures.pop("broken")
        if broken or statuses.keys() != {"200"}:
            found = f"statuses {statuses}, {broken} connections failed"
            raise BenchError(f"{self.name}, {clients} clients, {seconds:g} s: {found}")
        del figures["sent"]  # with a request or two that were still being answered
        rate = statuses["200"] / figures.pop("seconds")
        return {"clients": clients, "requests_per_second": rate} | figures

    def overload(self, rate: float, seconds: float) -> dict:
        """Requests at a fixed `rate`, whatever comes back; /health twenty times a second beside."""
        ended, health = threading.Event(), []

        def watch():
            with httpx.Client(trust_env=False) as client:
                while not ended.wait(0.05):
                    t0 = time.perf_counter()
                    client.get(f"{self.base}/health", timeout=60).raise_for_status()
                    health.append(time.perf_counter() - t0)

        watching = threading.Thread(target=watch)
        watching.start()
        used = [self.event_loop_seconds(), wrk_seconds()]
        figures = self.wrk(CONNECTIONS, seconds + 1, rate, 1)
        used = np.subtract([self.event_loop_seconds(), wrk_seconds()], used) / (seconds + 1)
        ended.set()
        watching.join()
        statuses = figures["statuses"]
        return {
            "offered_per_second": figures["sent"] / seconds,
            "answered_per_second": sum(statuses.values()) / seconds,
            "ok_per_second": statuses.get("200", 0) / seconds,
            "statuses": statuses,
            "health_p99_ms": 1e3 * np.percentile(health, 99),
            "event_loop_cores": None if math.isnan(used[0]) else used[0],
            "wrk_cores": used[1],
        }

    def event_loop_seconds(self) -> float:
        """CPU seconds of the thread that reads and answers requests; the model has its own."""
        with contextlib.suppress(psutil.AccessDenied):  # macOS
            for thread in psutil.Process(self.process.pid).threads():
                if thread.id == self.process.pid:
                    return thread.user_time + thread.system_time
        return math.nan

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(15)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def wrk_seconds() -> float:
    """CPU seconds of all clients that have ended; servers are still running."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def instructions() -> str:
    """The CPU's int8 instructions; without any torch._int_mm is no fast kernel, and its rate no
    measure of the machine."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    known = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
    return " ".join(sorted(known & {*text.split()}))


def fastest(run: Callable, repeats: int) -> float:
    return min(timeit.repeat(run, number=1, repeat=repeats))


def matmul_share(classifier: Classifier, repeats: int, rows=16, tokens=52) -> dict:
    """The time that torch._int_mm needs for a batch's products with weights, and its part of the
    time that the int8 engine needs for the whole batch."""
    dim, hidden, layers = Config().dim, Config().hidden_dim, Config().n_layers - 1
    m = rows * tokens  # the last layer computes all of its keys and values, little else
    shapes = {(m, dim, dim): 4 * layers + 2, (m, dim, hidden): layers, (m, hidden, dim): layers}
    torch.set_num_threads(threads())
    seconds = 0.0
    for (m, k, n), count in shapes.items():
        a, b = (torch.randint(-127, 127, shape, dtype=torch.int8) for shape in ((m, k), (k, n)))
        seconds += count * fastest(lambda a=a, b=b: torch._int_mm(a, b), repeats)
    batch = [[1] * tokens] * rows
    engine = fastest(lambda: classifier.scores(batch), repeats)
    figures = {"batch": f"{rows} x {tokens} tokens", "int_mm_ms": 1e3 * seconds}
    return figures | {"engine_ms": 1e3 * engine, "share": seconds / engine}


def measure(name: str, server: Server, number: int, args, say: Callable[[str], None]) -> list[dict]:
    """All rows of one server in one round."""
    setting = {"server": name, "round": number}
    rows = []
    for clients in CLIENTS:
        row = server.closed_loop(clients, args.seconds)
        rows.append({"kind": "loop"} | setting | row)
        say(
            f"{name}, {clients} clients: {row['requests_per_second']:.1f} requests/s, "
            f"p50 {row['p50_ms']:.1f} ms"
        )
    start = {"start_seconds": server.start_seconds, "resident_mb": server.start_mb}
    start["after_mb"] = server.resident_mb()
    rows.append({"kind": "start"} | setting | start)
    if name == "int8":
        best = max(row["requests_per_second"] for row in rows if row["kind"] == "loop")
        row = server.overload(OVERLOAD * best, args.seconds)
        row["share_of_best"] = row["ok_per_second"] / best
        rows.append({"kind": "overload"} | setting | row)
        say(
            f"{name}, {row['offered_per_second']:.0f} requests/s offered: "
            f"{row['ok_per_second']:.1f} answered, {row['share_of_best']:.2f} of the best"
        )
    return rows


def run(args, folder: Path, texts: list[str]) -> tuple[list[dict], dict]:
    """(rows, {server that was left out: why})."""
    make_checkpoint(folder)
    infinity, why = infinity_python(args.quick)
    skipped = {} if infinity else {"infinity": why}
    names = [name for name in SERVERS if name not in skipped]
    total = args.rounds * (len(names) * len(CLIENTS) + 3 + bool(instructions()))
    rows, progress = [], tqdm(total=total, unit="figure")

    def say(text: str) -> None:
        progress.write(text)
        progress.update()

    for number in range(args.rounds):
        for name in names:
            server = Server(name, folder, texts, infinity)
            try:
                server.wait_until_it_answers()
                found = measure(name, server, number, args, say)
            except BenchError as error:
                if name in OURS:
                    raise
                skipped[name] = str(error)
                print(error, flush=True)
                continue
            finally:
                server.stop()
            if name in OURS:
                classifier = Classifier(folder, name)
                # the same work in this process: tokenise, one forward pass, an answer
                runs = [partial(classifier.predict, [text]) for text in texts[:200]]
                times = [timeit.timeit(run, number=1) for run in runs]
                found[len(CLIENTS)]["without_http_p50_ms"] = 1e3 * np.median(times)
                say(f"{name}, without HTTP")
                if name == "int8" and instructions():
                    row = matmul_share(classifier, 5 if args.quick else 30)
                    found.append({"kind": "matmul", "server": name, "round": number} | row)
                    say(f"{name}: {row['share']:.2f} of torch._int_mm's rate")
            rows += found
        names = [name for name in names if name not in skipped]
    return rows, skipped


def summary(rows: list[dict]) -> str:
    loops = pd.DataFrame(rows).query("kind == 'loop'")
    figures = ["requests_per_second", "p50_ms"]
    table = loops.pivot_table(figures, "server", "clients", "median", sort=False)
    return table.round(1).to_string()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 2 s each: does it run?")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server, too
    if not shutil.which("wrk"):
        raise BenchError("wrk sends the requests; apt-get install wrk, or brew install wrk")
    args.rounds, args.seconds = (1, 2) if args.quick else (3, 6)
    data = os.environ.get("AG_NEWS_DIR")
    texts = read_folder(Path(data) if data else SAMPLE)[1].texts
    header = record_header()
    with tempfile.TemporaryDirectory() as folder:
        rows, skipped = run(args, Path(folder), texts)
    record = header | {
        "instructions": instructions(),
        "model": "DistilBERT-base, random weights",
        "texts": f"folder {Path(data).name}" if data else "sample",
        "seconds": args.seconds,
        "skipped": skipped,
    }
    record["versions"] |= {name: version(name) for name in ("openvino", "litserve")}
    record["versions"]["infinity-emb"] = INFINITY
    path = ROOT / ("benchmarks/results" if args.record else "runs") / RECORD
    write_record(path, record, rows)
    left_out = "".join(f"left out: {name} ({why})\n" for name, why in skipped.items())
    print(f"{summary(rows)}\n{left_out}wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except (BenchError, SourceError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped")
