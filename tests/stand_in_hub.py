"""A small stand-in of the hub on this machine: the parts of its HTTP API that download and upload a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "5" * 40


class Hub(ThreadingHTTPServer):
    """Serves repositories from ``root/models/ORG/NAME`` and ``root/datasets/ORG/NAME``.

    Attributes:
        asked: the path of each request so far.
        gated: repositories that are given to nobody.
        token: who may upload.
        private: repositories that were created, by name, each with True if it is private.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[str] = []
        self.gated: set[str] = set()
        self.token = "hf_stand_in"
        self.private: dict[str, bool] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """The hub, for as long as the block lasts."""
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repo, rest = self._api()
        if rest[:1] == ["paths-info"]:
            self._json([_entry(name, repo / name) for name in json.loads(body)["paths"] if (repo / name).exists()])
        elif self.headers["Authorization"] != f"Bearer {self.server.token}":
            self._refuse(401)
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            facts = json.loads(body)
            name = f"{facts['organization']}/{facts['name']}"
            visibility = facts.get("visibility") or ("private" if facts["private"] else "public")
            self.server.private.setdefault(name, visibility == "private")
            (self.server.root / "models" / name).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self.server.url}/{name}"})
        elif rest[:1] == ["preupload"]:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        else:
            assert rest[:1] == ["commit"], self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (repo / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{self.server.url}/{'/'.join(repo.parts[-2:])}/commit/{SHA}"
            self._json({"success": True, "commitOid": SHA, "commitUrl": url})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        words = path.strip("/").split("/")
        if words[0] == "api":
            self._answer_api()
        elif "resolve" in words:
            kind = "datasets" if words[0] == "datasets" else "models"
            words = words[1:] if kind == "datasets" else words
            self._file(self.server.root / kind / words[0] / words[1], "/".join(words[4:]))
        else:
            self._refuse(404)

    def _api(self) -> tuple[Path, list[str]]:
        words = unquote(urlsplit(self.path).path).strip("/").split("/")[1:]
        return self.server.root.joinpath(*words[:3]), words[3:]

    def _answer_api(self) -> None:
        repo, rest = self._api()
        if not repo.is_dir():
            self._refuse(404, "RepoNotFound")
            return
        if rest[:1] == ["tree"]:
            recursive = "recursive=true" in self.path.lower()
            folder = repo.joinpath(*rest[2:])
            found = folder.rglob("*") if recursive else folder.glob("*")
            self._json([_entry(path.relative_to(repo).as_posix(), path) for path in sorted(found)])
        else:
            names = [path.relative_to(repo).as_posix() for path in sorted(repo.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": name} for name in names]
            name = "/".join(repo.parts[-2:])
            self._json({"id": name, "sha": SHA, "siblings": siblings, "tags": [], "private": False})

    def _file(self, repo: Path, name: str) -> None:
        if "/".join(repo.parts[-2:]) in self.server.gated:
            self._refuse(403, "GatedRepo")
            return
        path = repo / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": SHA})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{_id(data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        code, total = 200, len(data)
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            last = min(int(end), total - 1) if end else total - 1
            data, code = data[int(start) : last + 1], 206
            headers["Content-Range"] = f"bytes {start}-{last}/{total}"
        self._send(code, data, headers)

    def _json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: int, why: str = "", headers: dict[str, str] | None = None) -> None:
        self._send(code, b"", {**(headers or {}), **({"X-Error-Code": why} if why else {})})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _id(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(name: str, path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": _id(name.encode())}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _id(path.read_bytes())}
