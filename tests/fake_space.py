"""The part of a Hub on loopback that creates, fills and runs a Docker Space, and the Space's app.

The real client talks to it through HF_ENDPOINT. `with FakeSpace() as hub:` a test says how it
behaves by setting its attributes, and finds what was committed in `hub.files`.
"""

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub, path = self.server.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append(path)
        if path == "/api/repos/create":
            hub.created = json.loads(body)
            status, answer = hub.create_status, {"url": f"{hub.url}/spaces/some-one/news"}
        elif path.startswith("/app/"):
            hub.app_tokens.add(self.headers.get("Authorization"))
            status = hub.app_statuses.pop(0) if hub.app_statuses else 200
            answer = hub.app[path.removeprefix("/app")]
            if isinstance(status, bytes):  # this body instead
                status, answer = 200, status
        elif path == "/api/validate-yaml":
            status, answer = 200, {"warnings": [], "errors": []}
        else:
            kind = re.fullmatch(r"/api/spaces/some-one/news/?([a-z]*)(?:/main)?", path)[1]
            status = 200 if hub.create_status == 200 else 404  # else the client looks for it
            answer = getattr(self, kind or "info")(hub, body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    do_POST = do_GET

    def info(self, hub, body) -> dict:
        return {"id": "some-one/news", "sha": COMMIT, "host": f"{hub.url}/app"} | hub.space

    revision = info

    def preupload(self, hub, body) -> dict:
        return {
            "files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
        }

    def commit(self, hub, body) -> dict:
        for item in map(json.loads, body.splitlines()):
            if item["key"] == "file":
                hub.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        return {"commitUrl": f"{hub.url}/spaces/some-one/news/commit/{COMMIT}", "commitOid": COMMIT}

    def runtime(self, hub, body) -> dict:
        stage, sha = hub.stages.pop(0) if len(hub.stages) > 1 else hub.stages[0]
        return {"stage": stage, "sha": sha, "hardware": {"current": "cpu-basic"}}

    def log_message(self, *args):
        pass


class FakeSpace:
    def __init__(self, checkpoint: str):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.url = self, f"http://127.0.0.1:{self.server.server_port}"
        self.asked, self.files, self.created, self.app_tokens = [], {}, None, set()
        self.create_status, self.space = 200, {"sdk": "docker", "private": False}
        self.stages, self.app_statuses = [("RUNNING", COMMIT)], []
        self.app = {
            "/health": {"status": "healthy", "model": {"checkpoint": checkpoint}},
            "/predict": {"label": "Business", "confidence": 0.97},
        }

    def __enter__(self):
        Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
