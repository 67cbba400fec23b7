"""A Hugging Face Hub on loopback; the real libraries talk to it through HF_ENDPOINT."""

import base64
import json
import re
import socket
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import uvicorn
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def fake_server(answer):
    """The address of a server that answers a request with the Response answer(request, body)."""

    async def app(scope, receive, send):
        request = Request(scope, receive)
        await answer(request, await request.body())(scope, receive, send)

    how = {"lifespan": "off", "log_config": None, "access_log": False}
    server = uvicorn.Server(uvicorn.Config(app, **how))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=server.run, args=[[listening]], daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def fake_hub(folder: Path):
    """As much of a Hub as loading a model and a dataset asks for: hub.url, hub.asked

    It serves a folder's `models/NAME/...` and `datasets/OWNER/NAME/...`, every repository at one
    commit, and notes each request in `asked`.
    """
    hub = SimpleNamespace(asked=[])

    def answer(request: Request, body: bytes) -> Response:
        path = request.scope["path"]
        hub.asked.append(f"{request.method} {path}")
        if match := re.fullmatch(r"/(datasets/)?(.+?)/resolve/[^/]+/(.+)", path):
            file = folder / (match[1] or "models/") / match[2] / match[3]
            if not file.is_file():
                return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
            return FileResponse(file, headers={"X-Repo-Commit": COMMIT})
        match = re.fullmatch(r"/api/((?:models|datasets)/.+?)/(revision|tree)/.+", path)
        repo = folder / match[1] if match else folder / "none"
        if not repo.is_dir():
            return Response(status_code=404, headers={"X-Error-Code": "RepoNotFound"})
        if match[2] == "revision":
            return JSONResponse({"id": match[1].partition("/")[2], "sha": COMMIT})
        sizes = {path: path.stat().st_size for path in repo.rglob("*") if path.is_file()}
        files = [
            {"type": "file", "path": str(path.relative_to(repo)), "oid": "0", "size": size}
            for path, size in sizes.items()
        ]
        return JSONResponse(files)

    with fake_server(answer) as hub.url:
        yield hub


@contextmanager
def fake_space(checkpoint: str):
    """The part of a Hub that creates, fills and runs a Docker Space, and the Space's app.

    A test says how it behaves by setting its attributes, and finds what was committed in
    `hub.files`.
    """
    hub = SimpleNamespace(
        asked=[],
        files={},
        created=None,
        create_status=200,
        space={"sdk": "docker", "private": False},
        stages=[("RUNNING", COMMIT)],
        app_tokens=set(),
        app_statuses=[],  # bytes: this body instead
        app={
            "/health": {"status": "healthy", "model": {"checkpoint": checkpoint}},
            "/predict": {"label": "Business", "confidence": 0.97},
        },
    )

    def answer(request: Request, body: bytes) -> Response:
        path = request.scope["path"]
        hub.asked.append(path)
        if path == "/api/repos/create":
            hub.created = json.loads(body)
            return JSONResponse({"url": f"{hub.url}/spaces/some-one/news"}, hub.create_status)
        if path.startswith("/app/"):
            hub.app_tokens.add(request.headers.get("Authorization"))
            status = hub.app_statuses.pop(0) if hub.app_statuses else 200
            if isinstance(status, bytes):
                return Response(status, media_type="application/json")
            return JSONResponse(hub.app[path.removeprefix("/app")], status)
        if path == "/api/validate-yaml":
            return JSONResponse({"warnings": [], "errors": []})
        match = re.fullmatch(r"/api/spaces/some-one/news/?([a-z]*)(?:/main)?", path)
        if not match:
            return Response(status_code=404)
        said = {"id": "some-one/news", "sha": COMMIT, "host": f"{hub.url}/app"} | hub.space
        if match[1] == "preupload":
            new = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            said = {"files": [{"path": f["path"]} | new for f in json.loads(body)["files"]]}
        elif match[1] == "commit":
            for item in map(json.loads, body.splitlines()):
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    hub.files[item["value"]["path"]] = content
            url = f"{hub.url}/spaces/some-one/news/commit/{COMMIT}"
            said = {"commitUrl": url, "commitOid": COMMIT}
        elif match[1] == "runtime":
            stage, sha = hub.stages.pop(0) if len(hub.stages) > 1 else hub.stages[0]
            said = {"stage": stage, "sha": sha, "hardware": {"current": "cpu-basic"}}
        # where it could not be created the client looks for it
        return JSONResponse(said, 200 if hub.create_status == 200 else 404)

    with fake_server(answer) as hub.url:
        yield hub
