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
from urllib.parse import parse_qs, unquote, urlsplit

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

    def answer_json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def entries(self, repo: Path, below: str = "", recursive: bool = True) -> list[dict]:
        """What lies in a folder of a repository, as the Hub's API describes it."""
        found = []
        for path in sorted((repo / below).rglob("*") if recursive else (repo / below).iterdir()):
            content = path.read_bytes() if path.is_file() else b""
            found.append(
                {
                    "type": "file" if path.is_file() else "directory",
                    "path": str(path.relative_to(repo)),
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
            )
        return found

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        self.server.asked.append(f"{self.command} {path}")
        root = self.server.folder
        if match := re.fullmatch(r"/(datasets/)?(.+?)/resolve/[^/]+/(.+)", path):
            file = root / (match[1] or "models/") / match[2] / match[3]
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            content = file.read_bytes()
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(200, content, ETag=tag, X_Repo_Commit=COMMIT)
        match = re.fullmatch(r"/api/(models|datasets)/(.+?)/(revision|tree|paths-info)/(.+)", path)
        repo = root / match[1] / match[2] if match else root / "none"
        if not repo.is_dir():
            return self.answer(404, X_Error_Code="RepoNotFound")
        if match[3] == "tree":
            below = match[4].partition("/")[2]
            return self.answer_json(self.entries(repo, below, "recursive=true" in query.lower()))
        if match[3] == "paths-info":
            text = body.decode()
            wanted = json.loads(text)["paths"] if text[:1] == "{" else parse_qs(text)["paths"]
            return self.answer_json([e for e in self.entries(repo) if e["path"] in wanted])
        siblings = [{"rfilename": e["path"]} for e in self.entries(repo) if e["type"] == "file"]
        self.answer_json(
            {
                "id": match[2],
                "sha": COMMIT,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "siblings": siblings,
            }
        )

    do_HEAD = do_POST = do_GET


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
