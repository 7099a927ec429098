"""A hub on localhost that takes an upload, or refuses all, and remembers every request."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

OWNER = "tester"  # whose login the token is


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The JSON object of the body, or those of its lines."""
        return [json.loads(line) for line in self.body.decode().splitlines()]

    @property
    def text(self) -> str:
        """The body and whatever is base64 in it, readable."""
        texts = [self.body.decode("utf-8", "replace")]
        if self.method == "POST":
            texts += [json.dumps(row, ensure_ascii=False) for row in self.rows]  # no letter hides behind an escape
            encoded = [row["value"]["content"] for row in self.rows if row.get("key") == "file"]
            encoded += [file["sample"] for row in self.rows for file in row.get("files", [])]
            texts += [base64.b64decode(value).decode("utf-8", "replace") for value in encoded]
        return "\n".join(texts)


@dataclass
class FakeHub:
    status: int
    address: str = ""
    requests: list[Request] = field(default_factory=list)

    def sent_to(self, end: str) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(end)]

    def committed(self) -> dict[str, bytes]:
        """The contents of the committed files by path in the repository."""
        (commit,) = self.sent_to("/commit/main")
        blobs = {request.path.split("/")[-1]: request.body for request in self.requests if request.method == "PUT"}
        files = {}
        for row in commit.rows:
            value = row["value"]
            if row["key"] == "lfsFile":
                files[value["path"]] = blobs[value["oid"]]
            elif row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        return files

    def answer(self, request: Request) -> dict[str, Any]:
        path = request.path
        if request.method != "POST":
            return {}
        row = request.rows[0]
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return {"url": f"{self.address}/{row['organization'] or OWNER}/{row['name']}"}
        if path.endswith("/preupload/main"):
            return {
                "files": [{**file, "uploadMode": _mode(file["path"]), "shouldIgnore": False} for file in row["files"]]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            upload = f"{self.address}/storage"
            objects = [{**item, "actions": {"upload": {"href": f"{upload}/{item['oid']}"}}} for item in row["objects"]]
            return {"transfer": "basic", "objects": objects}
        assert path.endswith("/commit/main"), path
        repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
        return {"commitUrl": f"{self.address}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40}


@contextmanager
def fake_hub(status: int = 200) -> Iterator[FakeHub]:
    """The hub while the context is open; with another status than 200 it answers all with that."""
    hub = FakeHub(status)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path.split("?")[0], headers, body)
            hub.requests.append(request)
            answer = hub.answer(request) if hub.status == 200 else {"error": "no"}
            self.send_response(hub.status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST = do_PUT = do_HEAD = answer

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


if __name__ == "__main__":  # print the address, and answer until the input ends
    with fake_hub() as served:
        print(served.address, flush=True)
        sys.stdin.read()
