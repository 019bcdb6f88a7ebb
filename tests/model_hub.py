"""A model hub on loopback that implements the parts of huggingface.co's API that are used.

As there, small files come from the hub itself, and large ones from another host (the CDN) to which
the hub redirects, offering Xet too. Requests and bytes sent are recorded.
"""

import hashlib
import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin", ".pth", ".onnx")
_PIECE = 2**20


@dataclass(frozen=True)
class Request:
    """A request that arrived at "hub" or "cdn"."""

    host: str
    method: str
    path: str
    token: str | None


@dataclass
class ModelHub:
    """Serves `models`: repository → revision → file → content, or the path of its content."""

    models: dict[str, dict[str, dict[str, bytes | Path]]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)  # any other is refused
    gated: dict[str, str] = field(default_factory=dict)  # repository → the token with access
    status: HTTPStatus | None = None  # of all responses, if set
    # By file, for consecutive responses: bytes after which the connection is cut, or stalls.
    cuts: dict[str, list[int]] = field(default_factory=dict)
    stalls: dict[str, list[int]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)  # bytes by file
    url: str = ""
    cdn: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, folder: Path, revision: str = "main") -> None:
        """Serves all files of `folder`."""
        files: dict[str, bytes | Path] = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.models.setdefault(name, {})[revision] = files

    def fetched(self) -> list[str]:
        """The files whose content was requested, sorted."""
        paths = {request.path for request in self.requests if request.method == "GET"}
        return sorted(path.split("/", 5)[5] for path in paths if "/resolve/" in path)

    def commit(self, name: str, revision: str) -> str:
        """The commit of a revision."""
        return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()

    def files(self, name: str, revision: str) -> dict[str, bytes | Path] | None:
        """The files of a revision, by its name or its commit."""
        for known, files in self.models[name].items():
            if revision in (known, self.commit(name, known)):
                return files
        return None

    @contextmanager
    def served(self) -> Iterator["ModelHub"]:
        """Runs the hub while the context lasts; `url` is for HF_ENDPOINT."""
        servers = []
        for host in ("hub", "cdn"):
            handler = type(host, (_Handler,), {"hub": self, "host": host})
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.append(server)
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
        try:
            yield self
        finally:
            self.closing.set()
            for server in servers:
                server.shutdown()
                server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ModelHub
    host: str

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.host, self.command, path, token))
        parts = path.strip("/").split("/")
        is_listing = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if is_listing else parts[:2])
        revision, file = "/".join(parts[5:]) if is_listing else parts[3], "/".join(parts[4:])
        if self.hub.status is not None:
            return self._refuse(self.hub.status)
        if self.host == "hub" and token is not None and token not in self.hub.tokens:
            return self._refuse(
                HTTPStatus.UNAUTHORIZED,
                ("X-Error-Message", "Invalid credentials in Authorization header"),
            )
        if repository not in self.hub.models:
            # Like the real hub, which does not reveal which private models exist.
            status = HTTPStatus.NOT_FOUND if token else HTTPStatus.UNAUTHORIZED
            return self._refuse(status, ("X-Error-Code", "RepoNotFound"))
        files = self.hub.files(repository, revision)
        if files is None:
            return self._refuse(HTTPStatus.NOT_FOUND, ("X-Error-Code", "RevisionNotFound"))
        commit = next(
            self.hub.commit(repository, known)
            for known, content in self.hub.models[repository].items()
            if content is files
        )
        if is_listing:
            return self._list(repository, commit, files)
        if self.host == "hub" and token != self.hub.gated.get(repository, token):
            status = HTTPStatus.FORBIDDEN if token else HTTPStatus.UNAUTHORIZED
            return self._refuse(status, ("X-Error-Code", "GatedRepo"))
        if file not in files:
            return self._refuse(HTTPStatus.NOT_FOUND, ("X-Error-Code", "EntryNotFound"))
        return self._file(path, file, _content(files[file]), commit)

    def _refuse(self, status: HTTPStatus, *headers: tuple[str, str]) -> None:
        self._begin(status, 0, *headers)

    def _begin(self, status: HTTPStatus, length: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _list(self, repository: str, commit: str, files: dict[str, bytes | Path]) -> None:
        siblings = []
        for name, file in files.items():
            content = _content(file)
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = _git_id(content)
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        body = json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
        self._begin(HTTPStatus.OK, len(body), ("Content-Type", "application/json"))
        self.wfile.write(body)

    def _file(self, path: str, name: str, content: bytes, commit: str) -> None:
        headers = [("X-Repo-Commit", commit), ("Accept-Ranges", "bytes")]
        if self.host == "hub" and name.endswith(LARGE):
            headers += [
                ("Location", f"{self.hub.cdn}{path}"),
                ("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"'),
                ("X-Linked-Size", str(len(content))),
                ("X-Xet-Hash", "0" * 64),
                ("X-Xet-Refresh-Route", f"{self.hub.url}/api/models/xet/xet-read-token/main"),
            ]
            return self._begin(HTTPStatus.FOUND, 0, *headers)
        headers.append(("ETag", f'"{_git_id(content)}"'))
        start, status = 0, HTTPStatus.OK
        wanted = self.headers.get("Range")
        if wanted is not None:
            start, status = (
                int(wanted.removeprefix("bytes=").rstrip("-")),
                HTTPStatus.PARTIAL_CONTENT,
            )
            headers.append(("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"))
        self._begin(status, len(content) - start, *headers)
        if self.command == "GET":
            self._send(name, content, start)

    def _send(self, name: str, content: bytes, start: int) -> None:
        cuts, stalls = self.hub.cuts.get(name), self.hub.stalls.get(name)
        planned = cuts or stalls
        end = min(start + planned.pop(0), len(content)) if planned else len(content)
        while start < end:
            piece = content[start : min(start + _PIECE, end)]
            self.wfile.write(piece)
            self.hub.sent[name] += len(piece)
            start += len(piece)
        if planned is not None:
            if planned is stalls:
                self.hub.closing.wait()
            self.close_connection = True


def _content(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
