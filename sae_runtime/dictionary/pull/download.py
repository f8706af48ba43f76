"""Downloads one file over HTTP: resumed where it broke off, verified, and put in place only when complete."""

from __future__ import annotations

import base64
import hashlib
import http.client
import ipaddress
import json
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

_CHUNK = 1 << 20
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_USER_AGENT = "saeserve"


class PullError(Exception):
    """A file could not be fetched, or is not the expected one; names the file and the reason."""


@dataclass(frozen=True)
class DownloadSettings:
    """Timeouts and retries of a download."""

    timeout_s: float = 30.0
    """Longest wait for a connection. Also the time in which a reply must bring `least_bytes`."""
    least_bytes: int = 16_384
    """A reply that brings fewer bytes in `timeout_s` is dropped and requested again."""
    attempts: int = 6
    """Number of attempts in a row without progress after which the download fails."""
    first_wait_s: float = 0.5
    """Wait before the second attempt. It doubles for every further attempt, up to 30 s, and varies by half."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch, and what is known about it beforehand."""

    url: str
    name: str
    """File name in the target folder."""
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    """git's name of the file: sha1 of "blob <size>\\0" and the content."""


@dataclass(frozen=True)
class Fetched:
    """A file that was fetched and put in place."""

    path: Path
    url: str
    size: int
    sha256: str
    verified: tuple[str, ...]
    """The kinds of checksums that the server gave and that agree: sha256, md5, git."""


T = TypeVar("T")
Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, its bytes so far, and its size if known."""


def check_url(url: str) -> None:
    """PullError unless the address is https, or http on this machine."""
    address = urllib.parse.urlsplit(url)
    if address.scheme == "https" and address.hostname:
        return
    if address.scheme == "http" and address.hostname and _is_loopback(address.hostname):
        return
    raise PullError(f"{url!r} is refused: expected https, or http on this machine")


def download(remote: RemoteFile, folder: Path, settings: DownloadSettings, progress: Progress | None = None) -> Fetched:
    """Fetches a file into `folder`. Resumes an earlier download if the server's file has not changed since.

    Raises:
        PullError: the server refuses or has no such file, fails repeatedly, or the content fails a checksum twice.
        OSError: the disk is full; what was fetched is kept.
    """
    check_url(remote.url)
    target = folder / remote.name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _Partial(target)
    problem = ""
    for _ in range(2):  # a damaged file is fetched once more
        md5 = _fetch(remote, partial, settings, progress)
        problem, sha256, verified = _verify(remote, partial.path, md5)
        if not problem:
            partial.finish()
            return Fetched(target, remote.url, target.stat().st_size, sha256, verified)
        partial.discard()
    raise PullError(f"{remote.url}: {problem}; fetched twice")


def get_json(url: str, settings: DownloadSettings) -> Any:
    """A JSON reply of at most 32 MiB.

    Raises:
        PullError: as for `download`, or the reply is too long or not JSON.
    """
    check_url(url)
    limit = 32 << 20

    def read() -> bytes:
        with _open(url, {}, settings) as reply:
            content: bytes = reply.read(limit + 1)
            expected = reply.headers.get("Content-Length")
            if expected is not None and len(content) < min(int(expected), limit):
                raise _Retryable(f"the reply ended after {len(content)} of {expected} bytes")
            return content

    content = _retry(url, settings, read)
    if len(content) > limit:
        raise PullError(f"{url}: the reply is over {limit} bytes")
    try:
        return json.loads(content)
    except ValueError as error:
        raise PullError(f"{url}: expected JSON, found {content[:80]!r}") from error


class _Retryable(Exception):
    """The attempt failed, but another may succeed."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _Partial:
    """The unfinished file beside its target, and the entity tag of the server's file."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target.with_name(target.name + ".part")
        self._tag_file = target.with_name(target.name + ".part.json")

    def length(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def tag(self, url: str) -> str | None:
        """The strong entity tag, if the partial file came from this address."""
        try:
            saved = json.loads(self._tag_file.read_text())
            return str(saved["etag"]) if saved["url"] == url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, url: str, etag: str | None) -> None:
        """Starts a new, empty partial file."""
        self.path.write_bytes(b"")
        if etag is None:
            self._tag_file.unlink(missing_ok=True)
        else:
            self._tag_file.write_text(json.dumps({"url": url, "etag": etag}))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._tag_file.unlink(missing_ok=True)

    def finish(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.replace(self._target)
        self._tag_file.unlink(missing_ok=True)


def _fetch(remote: RemoteFile, partial: _Partial, settings: DownloadSettings, progress: Progress | None) -> str | None:
    """Completes the partial file; returns the MD5 (base64) that the server gave for the whole file."""

    def attempt() -> str | None:
        fetched = partial.length()
        tag = partial.tag(remote.url) if fetched else None
        if fetched and tag is None:  # without a tag, the server's file may have changed
            fetched = 0
        headers = {"Range": f"bytes={fetched}-", "If-Range": tag} if fetched and tag is not None else {}
        try:
            opened = _open(remote.url, headers, settings)
        except _Unsatisfiable:
            partial.discard()
            raise
        with opened as reply:
            start, total = _extent(reply, fetched)
            if total is None and remote.size is None and not reply.chunked:
                raise PullError(f"{remote.url}: the server does not say how long the file is")
            etag = _strong(reply.headers.get("ETag"))
            if start == 0 or start != fetched or (etag is not None and etag != tag):
                if start != 0:
                    partial.discard()
                    raise _Retryable("the file changed on the server")
                partial.begin(remote.url, etag)
            if remote.size is not None and total is not None and total != remote.size:
                partial.discard()
                raise PullError(f"{remote.url} has {total} bytes, expected {remote.size}")
            with partial.path.open("ab") as file:
                _copy(reply, file, settings, lambda length: progress and progress(remote.name, length, total))
                length = file.tell()
            if total is not None and length < total:
                raise _Retryable(f"the reply ended after {length} of {total} bytes")
            if total is not None and length > total:
                partial.discard()
                raise _Retryable(f"the reply brought {length} bytes, expected {total}")
            blob_md5 = reply.headers.get("x-ms-blob-content-md5")  # of the whole blob, also in a partial reply
            return blob_md5 or (reply.headers.get("Content-MD5") if reply.status == 200 else None)

    return _retry(remote.url, settings, attempt, partial.length)


def _extent(reply: http.client.HTTPResponse, fetched: int) -> tuple[int, int | None]:
    """The offset in the file of the reply's first byte, and the file's size if the server gives it."""
    if reply.status == 206:
        content_range = reply.headers.get("Content-Range")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range or "")
        if match is None or int(match[1]) != fetched:
            raise PullError(f"{reply.url}: asked for bytes from {fetched} on, got Content-Range {content_range!r}")
        return int(match[1]), None if match[3] == "*" else int(match[3])
    length = reply.headers.get("Content-Length")
    return 0, int(length) if length is not None and length.isdigit() else None


def _copy(
    reply: http.client.HTTPResponse, file: IO[bytes], settings: DownloadSettings, report: Callable[[int], object]
) -> None:
    """Copies until the reply ends; a reply that stalls or is too slow is dropped."""
    window_at, window_bytes = time.monotonic(), 0
    while True:
        try:
            chunk = reply.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Retryable(f"the reply broke off: {error or type(error).__name__}") from error
        if not chunk:
            return
        file.write(chunk)
        report(file.tell())
        window_bytes += len(chunk)
        now = time.monotonic()
        if now - window_at >= settings.timeout_s:
            if window_bytes < settings.least_bytes:
                raise _Retryable(f"the reply brought only {window_bytes} bytes in {settings.timeout_s:g} s")
            window_at, window_bytes = now, 0


def _retry(url: str, settings: DownloadSettings, attempt: Callable[[], T], length: Callable[[], int] = lambda: 0) -> T:
    """Repeats an attempt while it raises _Retryable; the count starts again whenever `length` grew."""
    failures = 0
    while True:
        before = length()
        try:
            return attempt()
        except _Retryable as error:
            failures = 1 if length() >= before + settings.least_bytes else failures + 1
            if failures >= settings.attempts:
                raise PullError(f"{url}: {error} (attempt {failures}, given up)") from error
            wait = min(settings.first_wait_s * 2 ** (failures - 1), 30.0) * random.uniform(0.5, 1.5)
            settings.sleep(wait if error.wait_s is None else error.wait_s)


def _open(url: str, headers: dict[str, str], settings: DownloadSettings) -> http.client.HTTPResponse:
    """A reply with status 200 or 206."""
    request = urllib.request.Request(
        url,
        # identity: a compressed reply would have another length and other checksums than the file
        headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **headers},
    )
    try:
        reply: http.client.HTTPResponse = _OPENER.open(request, timeout=settings.timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in _RETRIED:
                raise _Retryable(f"the server answered {error.code} {error.reason}", _retry_after(error)) from error
            if error.code == 416:
                raise _Unsatisfiable(f"the server answered {error.code} {error.reason}") from error
            reason = {401: "needs permission", 403: "is not permitted", 404: "is not there"}.get(error.code, "failed")
            raise PullError(f"{url} {reason} ({error.code} {error.reason})") from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise _Retryable(f"no reply: {getattr(error, 'reason', None) or error or type(error).__name__}") from error
    return reply


class _Unsatisfiable(_Retryable):
    """The server has no bytes after the partial file's end: it is complete already, or of another file."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to addresses that `check_url` allows."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SafeRedirects)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    value = error.headers.get("Retry-After", "") if error.headers else ""
    return min(float(value), 120.0) if value.isdigit() else None


def _strong(etag: str | None) -> str | None:
    """The tag if it is strong, that is, if equal tags mean equal bytes. Only then can a download be resumed."""
    return etag if etag and not etag.startswith("W/") else None


def _verify(remote: RemoteFile, path: Path, md5: str | None) -> tuple[str, str, tuple[str, ...]]:
    """The problem with the file ("" if none), its sha256, and the kinds of checksums it was compared with."""
    size = path.stat().st_size
    hashes = {
        "sha256": hashlib.sha256(),
        "md5": hashlib.md5(usedforsecurity=False),
        "git": hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False),
    }
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for digest in hashes.values():
                digest.update(chunk)
    sha256 = hashes["sha256"].hexdigest()
    if remote.size is not None and size != remote.size:
        return f"has {size} bytes, expected {remote.size}", sha256, ()
    expected = {"sha256": remote.sha256, "git": remote.git_sha1, "md5": _hexadecimal(md5)}
    verified = []
    for kind, checksum in expected.items():
        if checksum is None:
            continue
        if (actual := hashes[kind].hexdigest()) != checksum:
            return f"its {kind} checksum is {actual}, the server said {checksum}", sha256, ()
        verified.append(kind)
    return "", sha256, tuple(verified)


def _hexadecimal(md5: str | None) -> str | None:
    """A base64 MD5 as hexadecimal digits; None if it is not an MD5."""
    try:
        digest = base64.b64decode(md5 or "", validate=True)
    except ValueError:
        return None
    return digest.hex() if len(digest) == 16 else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
