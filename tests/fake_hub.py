"""A Hugging Face Hub on loopback, as much of it as loading a model and a dataset asks for.

The real libraries talk to it through HF_ENDPOINT. It serves a folder's `models/NAME/...` and
`datasets/OWNER/NAME/...`, every repository at one commit, and notes each request in `asked`.
"""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path, root = unquote(urlsplit(self.path).path), self.server.folder
        self.server.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/(datasets/)?(.+?)/resolve/[^/]+/(.+)", path):
            file = root / (match[1] or "models/") / match[2] / match[3]
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            content = file.read_bytes()
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(200, content, ETag=tag, X_Repo_Commit=COMMIT)
        match = re.fullmatch(r"/api/((?:models|datasets)/.+?)/(revision|tree)/.+", path)
        repo = root / match[1] if match else root / "none"
        if not repo.is_dir():
            return self.answer(404, X_Error_Code="RepoNotFound")
        answer = {"id": match[1].partition("/")[2], "sha": COMMIT}
        if match[2] == "tree":
            files = [path for path in repo.rglob("*") if path.is_file()]
            answer = [
                {"type": "file", "path": str(path.relative_to(repo)), "oid": "0"}
                | {"size": path.stat().st_size}
                for path in files
            ]
        self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

    do_HEAD = do_GET


class HubStandIn:
    """with HubStandIn(folder) as hub: hub.url, hub.asked"""

    def __init__(self, folder: Path):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.folder, self.server.asked = folder, []
        self.asked, self.url = self.server.asked, f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
