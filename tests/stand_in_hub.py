"""A small stand-in of the hub on this machine: the part of its HTTP API that downloads a repository."""

from __future__ import annotations

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
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[str] = []
        self.gated: set[str] = set()

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
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        repo, rest = self._api()
        assert rest[0] == "paths-info", rest
        self._json([_entry(name, repo / name) for name in body["paths"] if (repo / name).exists()])

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
