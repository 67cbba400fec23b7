"""The API: rank 0's checkpoint behind POST /predict and GET /health.

uvicorn inference.app:app --port 7860        settings: ENGINE=auto|torch|onnx, CHECKPOINT_DIR
curl localhost:7860/predict -H 'Content-Type: application/json' -d '{"text": "Shares rose"}'
"""

import asyncio
import functools
import logging
import os
import signal
import sys
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field, StringConstraints

from inference.batcher import Batcher, QueueFull
from inference.model_loader import CHECKPOINTS, Classifier, LoadError

PAGE = (Path(__file__).parent / "index.html").read_text()
# the Space's page shows the app in a frame, from another site: so no X-Frame-Options either
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'self' https://huggingface.co https://*.hf.space"
)
LIMITS = {"/predict": 64 * 1024, "/predict/batch": 1024 * 1024}  # bytes of a body
DRAIN_SECONDS = float(os.environ.get("DRAIN_SECONDS", 1))  # for a balancer to see /health say so

logger = logging.getLogger("uvicorn.error")
requests = Counter("requests", "Requests by route and status", ["route", "status"])
seconds = Histogram(
    "request_seconds", "Time to answer what was let in, by route", ["route"],
    buckets=[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5],
)  # fmt: skip
batch_rows = Histogram("batch_rows", "Texts that shared a forward pass", buckets=[1, 2, 4, 8, 16])
waiting_rows = Gauge("waiting_rows", "Texts in the queue")
cut_texts = Counter("truncated_texts", "Texts longer than the model reads")


# \S: something other than white space
News = Annotated[str, StringConstraints(max_length=20_000, pattern=r"\S")]


class Text(BaseModel):
    text: News


class Texts(BaseModel):
    texts: Annotated[list[News], Field(min_length=1, max_length=64)]


class Prediction(BaseModel):
    label: str
    confidence: float = Field(ge=0, le=1)
    scores: dict[str, float]
    truncated: bool = Field(description="whether the text was longer than what the model reads")


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


class Problem(BaseModel):
    detail: str


class Service:
    """What one server process holds; `not_ready` says why it does not serve, or is empty."""

    def __init__(self):
        self.classifier, self.batcher, self.not_ready = None, None, "starting: loading the model"

    async def load(self) -> None:
        folder = Path(os.environ.get("CHECKPOINT_DIR", CHECKPOINTS))
        try:
            engine = os.environ.get("ENGINE", "auto")
            self.classifier = await asyncio.to_thread(Classifier, folder, engine)
        except Exception as error:
            if not isinstance(error, LoadError):
                logger.exception("the model cannot be loaded")
            # not raised: uvicorn would wrap a traceback around the one line that helps
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        self.batcher = Batcher(self.classifier.scores, on_batch=batch_rows.observe)
        waiting_rows.set_function(lambda: len(self.batcher.waiting))
        self.not_ready = ""
        info = self.classifier.info
        logger.info("serving %s, trained on %s, with %s on %s",
                    info["backbone"], info["data"], info["engine"], info["device"])  # fmt: skip

    def drain_on_sigterm(self) -> None:
        """SIGTERM: /health says 503 for a moment, then uvicorn finishes what it has and stops."""
        if threading.current_thread() is not threading.main_thread():
            return  # a test's server; only the main thread may set handlers
        uvicorns, loop = signal.getsignal(signal.SIGTERM), asyncio.get_running_loop()
        server = getattr(uvicorns, "__self__", None)  # uvicorn's handler is a method of its server

        def stop():
            if server is None:
                return uvicorns(signal.SIGTERM, None)
            server.should_exit = True  # its handler would raise the signal again, and exit by it

        def drain(number, frame):
            if self.not_ready.startswith("draining"):
                os._exit(128 + number)  # the second one means now
            self.not_ready = "draining: shutting down"
            loop.call_soon_threadsafe(loop.call_later, DRAIN_SECONDS, stop)

        signal.signal(signal.SIGTERM, drain)


@asynccontextmanager
async def lifespan(app: FastAPI):
    # loaded once, in the background: /health can say "starting" while it takes its seconds
    service = Service()
    service.drain_on_sigterm()
    loading = asyncio.create_task(service.load())
    yield {"service": service}
    loading.cancel()
    if service.batcher:
        service.batcher.close()


app = FastAPI(
    title="DistriNews",
    description="Labels news as World, Sports, Business or Sci/Tech.",
    lifespan=lifespan,
    responses={status: {"model": Problem} for status in (413, 422, 429, 503)},
)


@functools.lru_cache  # under overload most answers are this one
def full(retry_after: int) -> JSONResponse:
    return JSONResponse({"detail": "the queue is full"}, 429, {"Retry-After": str(retry_after)})


class Door:
    """Turns away what cannot be served before anything is spent on it, and counts all requests."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if refusal := self.refusal(scope):
            requests.labels(scope["path"], refusal.status_code).inc()
            return await refusal(scope, receive, send)
        status, began = 500, time.perf_counter()

        async def watched(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            # the route's own path: what a client can invent would grow without bound
            path = scope["path"] if scope["path"] in LIMITS else "other"
            route = getattr(scope.get("route"), "path", path)
            requests.labels(route, status).inc()
            seconds.labels(route).observe(time.perf_counter() - began)

    def refusal(self, scope) -> Response | None:
        limit = LIMITS.get(scope["path"])
        if limit is None or scope["method"] != "POST":
            return None
        batcher = scope["state"]["service"].batcher
        if batcher and not batcher.room():
            return full(batcher.retry_after())
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            return JSONResponse({"detail": f"body: over {limit // 1024} KiB"}, 413)
        return None


app.add_middleware(Door)


@app.exception_handler(RequestValidationError)
async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """What is wrong and where, without the input: FastAPI's own answer echoes it, and becomes a
    500 when it cannot be written as UTF-8."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"][1:])) if first["type"] != "json_invalid" else ""
    what = "is blank" if first["type"] == "string_pattern_mismatch" else first["msg"]
    return JSONResponse({"detail": f"{place or 'body'}: {what}"}, 422)


@app.exception_handler(400)
async def unreadable(request: Request, error: HTTPException) -> JSONResponse:
    """JSON that the parser gives up on, such as a thousand nested lists."""
    return JSONResponse({"detail": "body: cannot be read as JSON"}, 422)


@app.exception_handler(QueueFull)
async def busy(request: Request, error: QueueFull) -> JSONResponse:
    return full(error.retry_after)


def ready(request: Request) -> Service:
    service = request.state.service
    if not service.batcher:
        raise HTTPException(503, service.not_ready, {"Retry-After": "1"})
    return service


async def predict_all(service: Service, texts: list[str]) -> list[dict]:
    # tokenising is fast, but a long text takes milliseconds, and the loop has others to serve
    encoded = await asyncio.to_thread(lambda: [service.classifier.encode(text) for text in texts])
    cut_texts.inc(sum(one.truncated for one in encoded))
    scores = await service.batcher.submit([one.ids for one in encoded])
    return [service.classifier.answer(*pair) for pair in zip(encoded, scores, strict=True)]


@app.post("/predict", response_model=Prediction, max_body_size=LIMITS["/predict"])
async def predict(body: Text, request: Request):
    """The label of one text, with the probability of each."""
    return (await predict_all(ready(request), [body.text]))[0]


@app.post("/predict/batch", response_model=Predictions, max_body_size=LIMITS["/predict/batch"])
async def predict_batch(body: Texts, request: Request):
    """The same for 1 to 64 texts, in their order."""
    return {"predictions": await predict_all(ready(request), body.texts)}


@app.get("/health", response_model=Health)
async def health(request: Request):
    """200 when requests are served, and which model serves them; else 503 and why not."""
    service = request.state.service
    if service.not_ready:
        raise HTTPException(503, service.not_ready, {"Retry-After": "1"})
    return {"status": "healthy", "model": service.classifier.info}


@app.get("/metrics", response_class=Response)
async def metrics():
    """Prometheus text."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page():
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})
