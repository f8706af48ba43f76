"""A server on this machine that serves files as the real ones do, and misbehaves as it is told."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """One address. Each request takes the next of `faults`; when they are used up it is served well."""

    content: bytes
    headers: dict[str, str] = field(default_factory=dict)
    faults: list[Any] = field(default_factory=list)
    """("status", code, headers) | ("cut", bytes) | ("stall", bytes) | ("drip",) | ("ignore range",) | ("damage",) |
    ("no length",) | ("redirect", url)"""
    ranges: bool = True


class FileServer:
    """Serves `files` by path; `requests` are the paths and Range headers that were asked for."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.released = threading.Event()
        """Ends every stalled reply."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                server._answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, path: str, content: bytes, *faults: Any, etag: str | None = '"tag"', **headers: str) -> Served:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self.files[path] = Served(content, ({"ETag": etag} if etag else {}) | given, list(faults))
        return self.files[path]

    def ranges_of(self, path: str) -> list[str | None]:
        return [range_ for asked, range_ in self.requests if asked == path]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path, byte_range = request.path, request.headers.get("Range")
        self.requests.append((path, byte_range))
        served = self.files.get(path)
        if served is None:
            self._send(request, 404, {}, b"")
            return
        fault = served.faults.pop(0) if served.faults else ("none",)
        if fault[0] == "status":
            self._send(request, fault[1], fault[2] if len(fault) > 2 else {}, b"sorry")
            return
        if fault[0] == "redirect":
            self._send(request, 302, {"Location": fault[1]}, b"")
            return
        content, status, headers = served.content, 200, dict(served.headers)
        if fault[0] == "damage":
            content = content[:-1] + bytes([content[-1] ^ 1])
        match = re.fullmatch(r"bytes=(\d+)-", byte_range or "")
        same = request.headers.get("If-Range") in (None, served.headers.get("ETag"))
        if match and same and fault[0] != "ignore range" and served.ranges:
            start = int(match[1])
            if start >= len(content):
                self._send(request, 416, {"Content-Range": f"bytes */{len(content)}"}, b"")
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            headers.pop("Content-MD5", None)
            content = content[start:]
        self._send(request, status, headers, content, fault)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        content: bytes,
        fault: Any = ("none",),
    ) -> None:
        request.send_response(status)
        if fault[0] != "no length":
            request.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Connection", "close")
        request.close_connection = True
        request.end_headers()
        try:
            match fault[0]:
                case "cut":
                    request.wfile.write(content[: fault[1]])
                case "stall":
                    request.wfile.write(content[: fault[1]])
                    request.wfile.flush()
                    self.released.wait(30)
                case "drip":
                    for byte in content:
                        request.wfile.write(bytes([byte]))
                        request.wfile.flush()
                        if self.released.wait(0.005):
                            break
                case _:
                    request.wfile.write(content)
        except OSError:
            pass  # the client has given up


def running() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.stop()


def md5_header(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def put_hub_repository(
    server: FileServer, repository: str, files: dict[str, bytes], *, revision: str = "main", license: str = "apache-2.0"
) -> str:
    """Serves a repository in the form of the Hugging Face hub; safetensors and .pt files are large. The commit."""
    commit = hashlib.sha1(repository.encode(), usedforsecurity=False).hexdigest()
    base = f"/api/models/{repository}"
    info = {"sha": commit, "cardData": {"license": license}, "gated": False}
    server.put(f"{base}/revision/{revision}", json.dumps(info).encode())

    def entry(path: str, content: bytes) -> dict[str, Any]:
        large = path.endswith((".safetensors", ".pt"))
        lfs = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}} if large else {}
        return {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content), **lfs}

    folders = {""} | {path.rpartition("/")[0] for path in files}
    for folder in folders:
        inside = [entry(path, content) for path, content in files.items() if path.rpartition("/")[0] == folder]
        inside += [
            {"type": "directory", "path": sub_folder, "size": 0, "oid": "0"} for sub_folder in folders - {"", folder}
        ]
        server.put(f"{base}/tree/{commit}/{folder}".rstrip("/"), json.dumps(inside).encode())
    server.put(f"{base}/tree/{commit}?recursive=true", json.dumps([entry(*item) for item in files.items()]).encode())
    for path, content in files.items():
        # The hub answers with a redirect to where large files are stored.
        server.put(f"/storage/{repository}/{path}", content)
        target = f"{server.address}/storage/{repository}/{path}"
        server.put(f"/{repository}/resolve/{commit}/{path}", b"", *[("redirect", target)] * 1000)
    return commit
