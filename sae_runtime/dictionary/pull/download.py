"""One file over HTTP: resumed where it broke off, verified, in place only when whole."""

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
    """A file could not be fetched, or is not what was expected; says which, and what was found."""


@dataclass(frozen=True)
class DownloadSettings:
    """How patient a download is."""

    timeout_s: float = 30.0
    """Longest wait for a connection, and the time in which at least `least_bytes` must arrive."""
    least_bytes: int = 16_384
    """A reply that brings less in timeout_s is given up and asked for again."""
    attempts: int = 6
    """Attempts in a row that bring nothing new, after which the download fails."""
    first_wait_s: float = 0.5
    """Wait before the second attempt; doubled for each further one, up to 30 s, and varied by half."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)


@dataclass(frozen=True)
class RemoteFile:
    """What is to be fetched, and what is known about it beforehand."""

    url: str
    name: str
    """File name, below the folder it is put into."""
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    """sha1 of "blob <size>\\0" and the content, as git names small files."""


@dataclass(frozen=True)
class Fetched:
    """A file that is in place."""

    path: Path
    url: str
    size: int
    sha256: str
    verified: tuple[str, ...]
    """Which checksums of the server it was compared with: sha256, md5, git."""


T = TypeVar("T")
Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, its bytes so far and all its bytes if known."""


def check_url(url: str) -> None:
    """PullError unless the address is https, or http on this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and parts.hostname and _is_loopback(parts.hostname):
        return
    raise PullError(f"{url!r} is refused: expected https, or http on this machine")


def download(remote: RemoteFile, folder: Path, settings: DownloadSettings, progress: Progress | None = None) -> Fetched:
    """Fetches a file into `folder`. A download of it that broke off is continued if the server's file is the same.

    Raises:
        PullError: the server refuses or has no such file, gives up repeatedly, or the content fails a checksum twice.
        OSError: the disk is full; what was fetched is kept.
    """
    check_url(remote.url)
    target = folder / remote.name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _Partial(target)
    complaint = ""
    for _ in range(2):  # a damaged file is fetched anew once
        md5 = _fetch(remote, partial, settings, progress)
        complaint, sha256, verified = _verify(remote, partial.path, md5)
        if not complaint:
            partial.finish()
            return Fetched(target, remote.url, target.stat().st_size, sha256, verified)
        partial.discard()
    raise PullError(f"{remote.url}: {complaint}; fetched twice")


def get_json(url: str, settings: DownloadSettings) -> Any:
    """A JSON reply of at most 32 MiB.

    Raises:
        PullError: as `download`; the reply is too long or no JSON.
    """
    check_url(url)
    limit = 32 << 20

    def read() -> bytes:
        with _open(url, {}, settings) as reply:
            content: bytes = reply.read(limit + 1)
            expected = reply.headers.get("Content-Length")
            if expected is not None and len(content) < min(int(expected), limit):
                raise _Again(f"the reply ended after {len(content)} of {expected} bytes")
            return content

    content = _retry(url, settings, read)
    if len(content) > limit:
        raise PullError(f"{url}: the reply is over {limit} bytes")
    try:
        return json.loads(content)
    except ValueError as error:
        raise PullError(f"{url}: expected JSON, found {content[:80]!r}") from error


class _Again(Exception):
    """The attempt failed in a way that another may not."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _Partial:
    """The unfinished file beside its place, and the tag of the server's file that it is a part of."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target.with_name(target.name + ".part")
        self._tag_file = target.with_name(target.name + ".part.json")

    def length(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def tag(self, url: str) -> str | None:
        """The strong entity tag, if the part is of this address."""
        try:
            saved = json.loads(self._tag_file.read_text())
            return str(saved["etag"]) if saved["url"] == url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, url: str, etag: str | None) -> None:
        """A new, empty part."""
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
    """Fills the part; returns the MD5 (base64) that the server gave for the whole file."""

    def attempt() -> str | None:
        have = partial.length()
        tag = partial.tag(remote.url) if have else None
        if have and tag is None:  # nothing says that the server's file is still the same
            have = 0
        headers = {"Range": f"bytes={have}-", "If-Range": tag} if have and tag is not None else {}
        try:
            opened = _open(remote.url, headers, settings)
        except _Unsatisfiable:
            partial.discard()
            raise
        with opened as reply:
            start, total = _extent(reply, have)
            if total is None and remote.size is None and not reply.chunked:
                raise PullError(f"{remote.url}: the server does not say how long the file is")
            etag = _strong(reply.headers.get("ETag"))
            if start == 0 or start != have or (etag is not None and etag != tag):
                if start != 0:
                    partial.discard()
                    raise _Again("the file changed on the server")
                partial.begin(remote.url, etag)
            if remote.size is not None and total is not None and total != remote.size:
                partial.discard()
                raise PullError(f"{remote.url} has {total} bytes, expected {remote.size}")
            with partial.path.open("ab") as file:
                _copy(reply, file, settings, lambda length: progress and progress(remote.name, length, total))
                length = file.tell()
            if total is not None and length < total:
                raise _Again(f"the reply ended after {length} of {total} bytes")
            if total is not None and length > total:
                partial.discard()
                raise _Again(f"the reply brought {length} bytes, expected {total}")
            whole = reply.headers.get("x-ms-blob-content-md5")  # of the whole blob, also in a partial reply
            return whole or (reply.headers.get("Content-MD5") if reply.status == 200 else None)

    return _retry(remote.url, settings, attempt, partial.length)


def _extent(reply: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """Where the reply's bytes begin in the file, and how long the file is if that is said."""
    if reply.status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", reply.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != have:
            raise PullError(
                f"{reply.url}: asked for bytes from {have} on, got Content-Range {reply.headers.get('Content-Range')!r}"
            )
        return int(match[1]), None if match[3] == "*" else int(match[3])
    length = reply.headers.get("Content-Length")
    return 0, int(length) if length is not None and length.isdigit() else None


def _copy(
    reply: http.client.HTTPResponse, file: IO[bytes], settings: DownloadSettings, report: Callable[[int], object]
) -> None:
    """Copies until the reply ends; a reply that stalls or drips is given up."""
    window_at, window_bytes = time.monotonic(), 0
    while True:
        try:
            chunk = reply.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Again(f"the reply broke off: {error or type(error).__name__}") from error
        if not chunk:
            return
        file.write(chunk)
        report(file.tell())
        window_bytes += len(chunk)
        now = time.monotonic()
        if now - window_at >= settings.timeout_s:
            if window_bytes < settings.least_bytes:
                raise _Again(f"the reply brought only {window_bytes} bytes in {settings.timeout_s:g} s")
            window_at, window_bytes = now, 0


def _retry(url: str, settings: DownloadSettings, attempt: Callable[[], T], length: Callable[[], int] = lambda: 0) -> T:
    """Repeats an attempt while it fails in passing; the count begins anew when it made `length` grow."""
    failures = 0
    while True:
        before = length()
        try:
            return attempt()
        except _Again as error:
            failures = 1 if length() >= before + settings.least_bytes else failures + 1
            if failures >= settings.attempts:
                raise PullError(f"{url}: {error} (attempt {failures}, given up)") from error
            wait = min(settings.first_wait_s * 2 ** (failures - 1), 30.0) * random.uniform(0.5, 1.5)
            settings.sleep(wait if error.wait_s is None else error.wait_s)


def _open(url: str, headers: dict[str, str], settings: DownloadSettings) -> http.client.HTTPResponse:
    """A reply with status 200 or 206."""
    request = urllib.request.Request(
        url,
        # identity: lengths and checksums are those of the file, not of a compressed reply
        headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **headers},
    )
    try:
        reply: http.client.HTTPResponse = _OPENER.open(request, timeout=settings.timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in _RETRIED:
                raise _Again(f"the server answered {error.code} {error.reason}", _retry_after(error)) from error
            if error.code == 416:
                raise _Unsatisfiable(f"the server answered {error.code} {error.reason}") from error
            reason = {401: "needs permission", 403: "is not permitted", 404: "is not there"}.get(error.code, "failed")
            raise PullError(f"{url} {reason} ({error.code} {error.reason})") from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise _Again(f"no reply: {getattr(error, 'reason', None) or error or type(error).__name__}") from error
    return reply


class _Unsatisfiable(_Again):
    """The server has no bytes from where the part ends: it is whole already, or of another file."""


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
    """An entity tag that promises equal bytes, without which nothing may be continued."""
    return etag if etag and not etag.startswith("W/") else None


def _verify(remote: RemoteFile, path: Path, md5: str | None) -> tuple[str, str, tuple[str, ...]]:
    """What is wrong with the file ("" if nothing), its sha256, and what it was compared with."""
    size = path.stat().st_size
    hashes = {
        "sha256": hashlib.sha256(),
        "md5": hashlib.md5(usedforsecurity=False),
        "git": hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False),
    }
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for each in hashes.values():
                each.update(chunk)
    sha256 = hashes["sha256"].hexdigest()
    if remote.size is not None and size != remote.size:
        return f"has {size} bytes, expected {remote.size}", sha256, ()
    expected = {"sha256": remote.sha256, "git": remote.git_sha1, "md5": _hexadecimal(md5)}
    verified = []
    for kind, wanted in expected.items():
        if wanted is None:
            continue
        if (found := hashes[kind].hexdigest()) != wanted:
            return f"its {kind} checksum is {found}, the server said {wanted}", sha256, ()
        verified.append(kind)
    return "", sha256, tuple(verified)


def _hexadecimal(md5: str | None) -> str | None:
    """A base64 MD5 as hexadecimal digits; None if it is none."""
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
