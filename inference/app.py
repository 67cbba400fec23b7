"""The API: rank 0's checkpoint behind POST /predict and GET /health.

uvicorn inference.app:app --port 7860 --http h11
curl localhost:7860/predict -H 'Content-Type: application/json' -d '{"text": "Shares rose"}'

Environment: CHECKPOINT_DIR, ENGINE=auto|torch|int8, THREADS (of the model; default: the cores),
ALLOW_ORIGINS (CORS; "*" or a comma-separated list), PROMETHEUS_MULTIPROC_DIR (an empty folder, in
which several workers share their /metrics).
uvicorn reads its own flags from there too: UVICORN_TIMEOUT_KEEP_ALIVE=30.
"""

import asyncio
import contextlib
import functools
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

from fastapi import Depends, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi_offline import FastAPIOffline

# texts are tokenized one by one: more threads would only contend with the model's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
METRICS_FOLDER = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
if METRICS_FOLDER == "":  # prometheus_client would take the folder that this process is in
    del os.environ["PROMETHEUS_MULTIPROC_DIR"]

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, FailFast, Field, StringConstraints

from inference.batcher import Batcher, QueueFull
from inference.model_loader import CHECKPOINTS, Classifier, LoadError, workers

PAGE = (Path(__file__).parent / "index.html").read_text(encoding="utf-8")
# the Space's page shows the app in a frame, from another site: so no X-Frame-Options either
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'self' https://huggingface.co https://*.hf.space"
)
# 20,000 characters that JSON escapes as \ud83d\ude00 are 240,000 bytes
MAX_BODY_BYTES = {"/predict": 256 * 1024, "/predict/batch": 1024 * 1024}
# A megabyte of numbers or empty lists would block the event loop while it is parsed
MAX_STRINGS, MAX_SYNTAX_BYTES = 1000, 10_000  # 64 texts are 65 strings; between them is little
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
MAX_BODY_SECONDS = 20  # from the end of the headers; uvicorn itself waits forever
MAX_UNREAD_BYTES = 64 * 1024 * 1024  # of all bodies that have arrived in part
MAX_SMALL_BODY = 16 * 1024  # bytes; still accepted when large bodies have used up MAX_UNREAD_BYTES

logger = logging.getLogger("uvicorn.error")


def problem_of(body: bytes) -> str | None:
    """Why this cannot be JSON with texts in a list, by checks that are cheaper than parsing."""
    try:
        # JSON has no NUL; UTF-16, which Python's parser reads as well, is full of them
        is_text = "\0" not in body.decode()
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        return "expected UTF-8"
    quotes = body.count(b'"') - body.count(b'\\"')
    if quotes > 2 * MAX_STRINGS or len(STRING.sub(b"", body)) > MAX_SYNTAX_BYTES:
        return "too many values"
    return None


def fail(error: Exception) -> NoReturn:
    """Ends the server with one line; an exception would get uvicorn's traceback around it.

    Exit status 3 means "cannot start" to the masters of uvicorn and gunicorn, which then start no
    further worker. uvicorn's would itself end with status 0, as if all were well, so the first of
    its workers ends it by a signal, and speaks for the others, who fail for the same reason. A
    worker of uvicorn's that replaces one that died ends itself alone, and is replaced in turn:
    the others serve. (gunicorn ends with such a worker.) In a container uvicorn itself may be
    process 1, which no signal from inside ends unasked: there it ends with status 0.

    In a notebook or a test, which has more to do than to serve, it is raised.
    """
    if not re.search("u[nv]icorn", sys.argv[0]):
        raise error
    kind, _, number = multiprocessing.current_process().name.rpartition("-")
    started_by_uvicorn = kind == "SpawnProcess" and "uvicorn" in sys.argv[0]  # with --workers
    master = multiprocessing.parent_process() if started_by_uvicorn else None
    first = number == "1"
    with contextlib.suppress(LoadError):  # a wrong number of workers is no replacement either
        if master and number.isdigit() and 1 < workers() < int(number):
            print(f"error: {error}; this worker ends", file=sys.stderr, flush=True)
            time.sleep(5)
            os._exit(1)
    if master and not first:
        master.join(10)  # the first is as slow as this one was
    if first or not master or (master.is_alive() and master.pid != 1):
        print(f"error: {error}", file=sys.stderr, flush=True)
    if master and first:
        os.kill(master.pid, signal.SIGALRM)
    os._exit(3)


if METRICS_FOLDER:
    try:
        Path(METRICS_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"PROMETHEUS_MULTIPROC_DIR={METRICS_FOLDER} is no folder: {error.strerror}"
        fail(LoadError(text))
    if not os.access(METRICS_FOLDER, os.W_OK):
        fail(LoadError(f"PROMETHEUS_MULTIPROC_DIR={METRICS_FOLDER} cannot be written"))

BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5]
requests = Counter("requests", "Requests by route and status", ["route", "status"])
seconds = Histogram("request_seconds", "Time to answer 200", ["route"], buckets=BUCKETS)
batch_rows = Histogram("batch_rows", "Texts in a forward pass", buckets=[1, 2, 4, 8, 16])
admitted_rows = Gauge("admitted_rows", "Texts being answered", multiprocess_mode="livesum")
truncated_texts = Counter("truncated_texts", "Texts longer than the model reads")

# a letter or digit: white space, punctuation, control, format and zero-width characters alone are
# nothing to the model. Compiled, since in pydantic's own engine \w includes zero-width joiners
NewsText = Annotated[
    str,
    StringConstraints(max_length=20_000, pattern=re.compile(r"[^\W_]")),
    Field(examples=["Shares rose after the bank raised its forecast"]),  # else /docs tries a letter
]


class PredictRequest(BaseModel):
    text: NewsText


class BatchRequest(BaseModel):
    # FailFast: else 64 texts without a letter are all looked through, on the event loop
    texts: Annotated[list[NewsText], Field(min_length=1, max_length=64), FailFast()]


class Prediction(BaseModel):
    label: str
    confidence: float = Field(ge=0, le=1)
    scores: dict[str, float]
    truncated: bool = Field(description="whether the text was longer than what the model reads")
    out_of_vocabulary: bool = Field(description="whether the model knows no word of the text")


class Predictions(BaseModel):
    predictions: list[Prediction]


class ModelInfo(BaseModel):
    backbone: str
    data: str
    engine: str
    device: str
    test_accuracy: float
    checkpoint: str = Field(description="the first digits of the checkpoint's SHA-256")


class Health(BaseModel):
    status: str
    model: ModelInfo


class ErrorResponse(BaseModel):
    detail: str


class Service:
    """The model behind its queue, one for the process."""

    def __init__(self):
        self.classifier, self.batcher, self.draining = None, None, False
        self.loading = None

    async def start(self) -> None:
        """Loads the model, once, even if the one who asked hangs up meanwhile. Raises LoadError."""
        if self.draining or (self.batcher and not self.batcher.task.get_loop().is_closed()):
            return
        self.loading = self.loading or asyncio.create_task(self.load())
        await asyncio.shield(self.loading)

    async def load(self) -> None:
        folder = Path(os.environ.get("CHECKPOINT_DIR") or CHECKPOINTS).expanduser()
        engine = os.environ.get("ENGINE") or "auto"
        try:
            self.classifier = await asyncio.to_thread(Classifier, folder, engine)
        finally:
            self.loading = None
        self.batcher = Batcher(
            self.classifier.scores, on_batch=batch_rows.observe, on_admitted=admitted_rows.set
        )
        text = "serving %(backbone)s, trained on %(data)s, with %(engine)s on %(device)s"
        logger.info(text, self.classifier.info)

    def stop(self) -> None:
        self.draining = True
        self.batcher.close()
        self.batcher = None

    async def predict(self, texts: list[str]) -> list[dict]:
        classifier = self.classifier
        with self.batcher.admit(len(texts)):
            encoded = []
            if sum(map(len, texts)) < 300:  # soon done; a thread would take longer
                encoded = list(map(classifier.encode, texts))
            while len(encoded) < len(texts):  # in pieces: a client that hangs up stops the rest
                piece = texts[len(encoded) :][:8]
                encoded += await asyncio.to_thread(list, map(classifier.encode, piece))
            truncated_texts.inc(sum(row.truncated for row in encoded))
            scores = await self.batcher.submit([row.ids for row in encoded])
        return list(map(classifier.answer, encoded, scores))


service = Service()


@contextlib.asynccontextmanager
async def lifespan(app: FastAPIOffline):
    """Loads the model before the server listens; frees it after the last answer."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than the limit it states
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one for each connection
    if "DRAIN_SECONDS" in os.environ:
        logger.warning(
            "DRAIN_SECONDS has no effect: SIGTERM closes the port and lets requests end;"
            " uvicorn's --timeout-graceful-shutdown says how long they may take"
        )
    service.draining = False
    if METRICS_FOLDER and sys.platform == "linux":
        for file in Path(METRICS_FOLDER).glob("gauge_live*.db"):  # of workers that were killed
            pid = file.stem.rpartition("_")[2]
            if not Path("/proc", pid).exists():
                with contextlib.suppress(FileNotFoundError):  # another worker was faster
                    multiprocess.mark_process_dead(pid)
    try:
        await service.start()
    except Exception as error:
        if not isinstance(error, LoadError):
            logger.exception("the model cannot be loaded")
        fail(error)
    yield
    service.stop()
    if METRICS_FOLDER:
        multiprocess.mark_process_dead(os.getpid())


app = FastAPIOffline(
    title="DistriNews",
    description="Labels news as World, Sports, Business or Sci/Tech.",
    lifespan=lifespan,
    docs_url=None,  # below: with paths that are right behind any prefix
    redoc_url=None,
    redirect_slashes=False,  # behind a proxy it would redirect to http
    servers=[{"url": "."}],  # where /docs sends its requests: beside itself, behind any prefix
    root_path_in_servers=False,  # a mount's path would come before it
    responses={s: {"model": ErrorResponse} for s in (408, 413, 415, 422, 429, 503)},
)


@functools.lru_cache  # under overload most answers are this one
def queue_full_response(retry_after: int) -> JSONResponse:
    return JSONResponse({"detail": "the queue is full"}, 429, {"Retry-After": str(retry_after)})


class LoadSheddingMiddleware:
    """Refuses invalid and excess requests before anything is spent on them, drops the work of
    clients that have hung up, and counts all requests except CORS preflights."""

    def __init__(self, app):
        self.app, self.unread_bytes = app, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removesuffix("\n")  # the router ignores it, too
        below = path.removeprefix(scope.get("root_path", ""))
        path = below if below.startswith("/") else path
        max_bytes = MAX_BODY_BYTES.get(path) if scope["method"] == "POST" else None
        if max_bytes and (refusal := self.refusal(scope, max_bytes)):
            requests.labels(path, refusal.status_code).inc()  # most of an overload ends here
            await self.discard(scope, receive)
            return await refusal(scope, receive, send)
        t0, status = time.perf_counter(), 499  # nginx's "client closed request"

        async def send_and_note(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if max_bytes:
                await self.predict(scope, receive, send_and_note, max_bytes)
            else:
                await self.app(scope, receive, send_and_note)
        except Exception:
            status = 500
            raise
        finally:
            # the route's own path: what a client can invent would grow without bound
            other = path if path in MAX_BODY_BYTES else "other"
            route = getattr(scope.get("route"), "path", other)
            requests.labels(route, status).inc()
            if status == 200:
                seconds.labels(route).observe(time.perf_counter() - t0)

    async def predict(self, scope, receive, send, max_bytes: int) -> None:
        body, more, refusal = bytearray(), True, None
        try:
            async with asyncio.timeout(MAX_BODY_SECONDS):
                while more and not refusal:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    self.unread_bytes += len(message.get("body", b""))
                    refusal = self.refusal(scope, max_bytes, len(body))
                    more = message.get("more_body", False)
        except TimeoutError:
            detail = f"body: not complete after {MAX_BODY_SECONDS} s"
            refusal = JSONResponse({"detail": detail}, 408, {"Connection": "close"})
        finally:
            self.unread_bytes -= len(body)
        if not refusal and (problem := problem_of(body)):
            refusal = JSONResponse({"detail": f"body: {problem}"}, 422)
        if refusal:
            if more:
                await self.discard(scope, receive)
            return await refusal(scope, receive, send)
        messages = [{"type": "http.request", "body": bytes(body)}]
        hangup = asyncio.create_task(receive())  # after the body nothing else can come

        async def replay():
            return messages.pop() if messages else await hangup

        handler = asyncio.create_task(self.app(scope, replay, send))
        try:
            await asyncio.wait({handler, hangup}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hangup.cancel()
            handler.cancel()  # without effect on one that is done
            await asyncio.wait({handler})
        if not handler.cancelled():
            handler.result()  # raises what it raised

    async def discard(self, scope, receive) -> None:
        """Reads what a client sends that closes the connection after it, such as nginx: if bytes
        of it are left, the kernel resets the connection, and the refusal with it."""
        headers = dict(scope["headers"])
        connection = headers.get(b"connection", b"").lower().replace(b" ", b"").split(b",")
        closes = b"close" in connection or scope.get("http_version") == "1.0"
        if b"keep-alive" in connection or not closes or b"expect" in headers:
            return
        read, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                while more and read < 4 * 1024 * 1024:
                    message = await receive()
                    read += len(message.get("body", b""))
                    more = message.get("more_body", False)

    def refusal(self, scope, max_bytes: int, read: int = 0) -> Response | None:
        if service.batcher and not service.batcher.has_capacity():
            return queue_full_response(service.batcher.retry_after())
        if read > MAX_SMALL_BODY and self.unread_bytes > MAX_UNREAD_BYTES:
            return queue_full_response(1)
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            return JSONResponse({"detail": "body: expected without Content-Encoding"}, 415)
        declared = headers.get(b"content-length", b"0")
        if read > max_bytes or (declared.isdigit() and int(declared) > max_bytes):
            return JSONResponse({"detail": f"body: over {max_bytes // 1024} KiB"}, 413)
        return None


app.add_middleware(LoadSheddingMiddleware)
# added last, so it sees the answers of the other one
if origins := os.environ.get("ALLOW_ORIGINS", "").lower().replace(",", " ").split():
    host = r"([a-z0-9._-]+|\[[0-9a-f:]+\])"  # browsers send neither a path nor the default port
    origin = rf"\*|http://{host}(?!:80$)(:\d+)?|https://{host}(?!:443$)(:\d+)?"
    if wrong := [one for one in origins if not re.fullmatch(origin, one)]:
        what = f"expected * or origins such as https://example.org, not {wrong[0]}"
        fail(LoadError(f"ALLOW_ORIGINS: {what}"))
    cors = {"allow_methods": ["GET", "POST"], "allow_headers": ["Content-Type"]}
    app.add_middleware(
        CORSMiddleware, allow_origins=origins, expose_headers=["Retry-After"], **cors
    )


@app.exception_handler(RequestValidationError)
async def invalid_request_handler(request: Request, error: RequestValidationError) -> JSONResponse:
    """What is wrong and where, without the input: FastAPI's own answer echoes it, and becomes a
    500 when it cannot be written as UTF-8."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"][1:])) if first["type"] != "json_invalid" else ""
    what = "has no letter or digit" if first["type"] == "string_pattern_mismatch" else first["msg"]
    if isinstance(error.body, bytes):  # FastAPI parses what says that it is JSON
        what = "expected JSON, and the header Content-Type: application/json"
    return JSONResponse({"detail": f"{place or 'body'}: {what}"}, 422)


@app.exception_handler(400)
async def unreadable_json_handler(request: Request, error: HTTPException) -> JSONResponse:
    """JSON that the parser gives up on, such as a thousand nested lists."""
    return JSONResponse({"detail": "body: cannot be read as JSON"}, 422)


@app.exception_handler(Exception)
async def failure_handler(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "the server failed; its log says why"}, 500)


@app.exception_handler(QueueFull)
async def queue_full_handler(request: Request, error: QueueFull) -> JSONResponse:
    return queue_full_response(error.retry_after)


async def get_service() -> Service:
    """The running service. In an app that another one has mounted no lifespan runs, so the first
    request starts it there."""
    try:
        await service.start()
    except LoadError as error:
        logger.error("%s", error)
        raise HTTPException(503, "the model cannot be loaded; the log says why") from None
    if service.draining:
        raise HTTPException(503, "draining: shutting down", {"Retry-After": "1"})
    return service


RunningService = Annotated[Service, Depends(get_service)]


@app.post("/predict", response_model=Prediction)
async def predict(body: PredictRequest, service: RunningService):
    """The label of one text, with the probability of each."""
    return (await service.predict([body.text]))[0]


@app.post("/predict/batch", response_model=Predictions)
async def predict_batch(body: BatchRequest, service: RunningService):
    """The same for 1 to 64 texts, in their order."""
    return {"predictions": await service.predict(body.texts)}


@app.head("/health", include_in_schema=False)
@app.get("/health", response_model=Health)
async def health(service: RunningService):
    """200 when requests are served, and which model serves them; else 503 and why not."""
    return {"status": "healthy", "model": service.classifier.info}


@app.head("/metrics", include_in_schema=False)
@app.get("/metrics", response_class=Response)
def metrics():  # in a thread: it reads the files of every worker there ever was
    """Prometheus text."""
    if not METRICS_FOLDER:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
    registry = CollectorRegistry()  # of all workers
    try:
        multiprocess.MultiProcessCollector(registry)
        text = generate_latest(registry)
    except Exception:  # the folder was removed, or a file in it was cut short
        logger.exception("PROMETHEUS_MULTIPROC_DIR=%s cannot be read", METRICS_FOLDER)
        raise HTTPException(503, "the metrics cannot be read; the log says why") from None
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page():
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})


@app.api_route("/source", methods=["GET", "HEAD"], include_in_schema=False)
async def source():
    """This file; or the repository, where SOURCE_URL or a Space's own variable says which."""
    url = os.environ.get("SOURCE_URL")
    if space := os.environ.get("SPACE_ID"):
        url = url or f"https://huggingface.co/spaces/{space}/tree/main"
    return RedirectResponse(url) if url else FileResponse(__file__, media_type="text/plain")


@app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
async def docs():
    """Swagger UI without its usual CDN; fastapi-offline serves the files."""
    assets = "static-offline-docs"
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="DistriNews",
        swagger_favicon_url="data:,",
        swagger_js_url=f"{assets}/swagger-ui-bundle.js",
        swagger_css_url=f"{assets}/swagger-ui.css",
    )
