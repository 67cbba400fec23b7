"""The part of a Hub on loopback that creates, fills and runs a Docker Space, and the Space's app.

The real client talks to it through HF_ENDPOINT. What was committed lies in `received(name)`; a
test says how the Hub behaves by setting the attributes of SpaceStandIn.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

from hub_stand_in import COMMIT, Handler, HubStandIn

APP_ANSWERS = {
    "/health": {"status": "healthy", "model": {"checkpoint": "0123456789ab"}},
    "/predict": {"label": "Business", "confidence": 0.97, "scores": {}, "truncated": False},
}


class SpaceHandler(Handler):
    def do_GET(self) -> None:
        hub = self.server.hub
        size = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(size)
        path = self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if path.startswith("/app/"):
            return self.app(hub, path.removeprefix("/app"))
        if path == "/api/repos/create":
            return self.create(hub)
        if path == "/api/validate-yaml":
            return self.answer_json({"warnings": [], "errors": []})
        if path.startswith("/lfs/"):
            hub.objects[path.removeprefix("/lfs/")] = self.body
            return self.answer(200)
        pattern = r"(?:/api)?/spaces/([^/]+/[^/.]+)(?:\.git/info/lfs/objects)?/?([a-z]*)(?:/.*)?"
        match = re.fullmatch(pattern, path)
        if not match or match[1] not in hub.spaces:
            return self.answer(404, X_Error_Code="RepoNotFound")
        return getattr(self, match[2] or "info")(hub, match[1])

    do_HEAD = do_POST = do_PUT = do_GET

    def create(self, hub) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        hub.created.append(asked)
        if hub.create_status:
            return self.answer(hub.create_status, b'{"error": "no"}')
        there = name in hub.spaces
        hub.spaces.setdefault(name, asked.get("visibility") == "private")
        hub.received(name).mkdir(parents=True, exist_ok=True)
        body = json.dumps({"url": f"{hub.url}/spaces/{name}"}).encode()
        self.answer(409 if there else 200, body, Content_Type="application/json")

    def info(self, hub, name) -> None:
        self.answer_json({"id": name, "private": hub.spaces[name], "sdk": hub.sdk,
                          "sha": COMMIT, "host": hub.host})  # fmt: skip

    revision = info

    def runtime(self, hub, name) -> None:
        stage = hub.stages.pop(0) if len(hub.stages) > 1 else hub.stages[0]
        if isinstance(stage, int):
            return self.answer(stage)
        self.answer_json({"stage": stage, "hardware": {"current": "cpu-basic"}} | hub.runtime)

    def preupload(self, hub, name) -> None:
        """How each file is to be sent, and what the repository holds of that name."""
        answers = []
        for file in json.loads(self.body)["files"]:
            place, lfs = hub.received(name) / file["path"], file["path"].endswith(hub.lfs)
            held = place.read_bytes() if place.exists() else None
            blob = hashlib.sha256(held or b"") if lfs else hashlib.sha1(
                b"blob %d\0%b" % (len(held or b""), held or b""))  # fmt: skip
            answers.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular",
                            "shouldIgnore": file["path"] in hub.ignored,
                            "oid": blob.hexdigest() if held is not None else None})  # fmt: skip
        self.answer_json({"files": answers})

    def batch(self, hub, name) -> None:
        """git-lfs: one PUT an object."""
        objects = json.loads(self.body)["objects"]
        self.answer_json({"transfer": "basic", "objects": [
            one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
            for one in objects]})  # fmt: skip

    def commit(self, hub, name) -> None:
        hub.commits += 1
        for line in self.body.splitlines():
            item = json.loads(line)
            file = item["value"]
            if item["key"] == "file":
                content = base64.b64decode(file["content"])
            elif item["key"] == "lfsFile":
                content = hub.objects[file["oid"]]
            else:
                continue
            place = hub.received(name) / file["path"]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        url = f"{hub.url}/spaces/{name}/commit/{COMMIT}"
        self.answer_json({"commitUrl": url, "commitOid": COMMIT})

    def tree(self, hub, name) -> None:
        self.answer_json(self.entries(hub.received(name)))

    def app(self, hub, path) -> None:
        """The Space's own server: it wakes, then answers; a private one knows its owner's token."""
        hub.app_tokens.add(self.headers.get("Authorization"))
        status = hub.app_statuses.pop(0) if hub.app_statuses else 200
        if status != 200:
            return self.answer(status, b"<html>starting</html>")
        self.answer_json(APP_ANSWERS[path])


class SpaceStandIn(HubStandIn):
    """with SpaceStandIn(folder) as hub: hub.url, hub.asked, hub.created, hub.received(name)"""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.server.RequestHandlerClass, self.server.hub = SpaceHandler, self
        self.spaces: dict[str, bool] = {}  # name -> private
        self.created, self.objects, self.commits, self.app_tokens = [], {}, 0, set()
        self.create_status, self.sdk, self.host = 0, "docker", f"{self.url}/app"
        self.stages, self.runtime, self.ignored = ["RUNNING"], {"sha": COMMIT}, ()
        self.lfs, self.app_statuses = ".onnx", []

    def received(self, name: str) -> Path:
        return self.server.folder / "spaces" / name
