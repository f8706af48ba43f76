"""Downloads survive broken, slow and forgetful servers, and give up clearly on those that cannot be trusted."""

import errno
import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_runtime.dictionary.pull.download import DownloadSettings, PullError, RemoteFile, check_url, download, get_json
from tests.sae_runtime.dictionary.pull.file_server import FileServer, git_sha1, md5_header, running

pytestmark = pytest.mark.any_cpu

CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture
def server() -> Iterator[FileServer]:
    yield from running()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def settings(waits: list[float]) -> DownloadSettings:
    return DownloadSettings(timeout_s=60, least_bytes=1000, attempts=3, sleep=waits.append)


def remote(server: FileServer, path: str = "/8.pt", **known: Any) -> RemoteFile:
    return RemoteFile(server.address + path, "8.pt", **known)


def test_a_file_is_put_in_place_whole(server: FileServer, settings: DownloadSettings, tmp_path: Path) -> None:
    server.put("/8.pt", CONTENT, Content_MD5=md5_header(CONTENT))
    seen: list[Any] = []
    fetched = download(remote(server), tmp_path, settings, lambda *event: seen.append(event))
    assert fetched.path.read_bytes() == CONTENT
    assert fetched.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert (fetched.size, fetched.verified) == (len(CONTENT), ("md5",))
    assert seen[-1] == ("8.pt", len(CONTENT), len(CONTENT))
    assert [path.name for path in tmp_path.iterdir()] == ["8.pt"]


def test_a_broken_reply_is_continued_where_it_ended(
    server: FileServer, settings: DownloadSettings, tmp_path: Path, waits: list[float]
) -> None:
    server.put("/8.pt", CONTENT, ("cut", 100_000), ("cut", 50_000), Content_MD5=md5_header(CONTENT))
    fetched = download(remote(server), tmp_path, settings)
    assert fetched.path.read_bytes() == CONTENT
    assert server.ranges_of("/8.pt") == [None, "bytes=100000-", "bytes=150000-"]
    assert len(waits) == 2


def test_a_later_call_continues_an_interrupted_one(
    server: FileServer, settings: DownloadSettings, tmp_path: Path
) -> None:
    server.put("/8.pt", CONTENT, ("cut", 100_000))

    def interrupt(name: str, length: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(remote(server), tmp_path, settings, interrupt)
    have = (tmp_path / "8.pt.part").stat().st_size
    assert 0 < have <= 100_000
    assert download(remote(server), tmp_path, settings).path.read_bytes() == CONTENT
    assert server.ranges_of("/8.pt") == [None, f"bytes={have}-"]


def test_a_complete_part_is_taken_or_fetched_again(
    server: FileServer, settings: DownloadSettings, tmp_path: Path
) -> None:
    # Killed between the last byte and the renaming: the server has nothing from there on.
    server.put("/8.pt", CONTENT, ("cut", 100_000), ("status", 404))
    with pytest.raises(PullError, match=r"8\.pt is not there \(404"):
        download(remote(server), tmp_path, settings)
    (tmp_path / "8.pt.part").write_bytes(CONTENT)
    assert download(remote(server), tmp_path, settings).path.read_bytes() == CONTENT
    assert server.ranges_of("/8.pt")[2:] == [f"bytes={len(CONTENT)}-", None]


def test_a_file_that_changed_meanwhile_begins_anew(
    server: FileServer, settings: DownloadSettings, tmp_path: Path
) -> None:
    server.put("/8.pt", CONTENT, ("cut", 100_000), ("status", 404))
    with pytest.raises(PullError):
        download(remote(server), tmp_path, settings)
    other = CONTENT[::-1]
    server.put("/8.pt", other, etag='"another"')
    assert download(remote(server), tmp_path, settings).path.read_bytes() == other


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_tag_nothing_is_continued(
    server: FileServer, settings: DownloadSettings, tmp_path: Path, etag: str | None
) -> None:
    server.put("/8.pt", CONTENT, ("cut", 100_000), etag=etag)
    assert download(remote(server), tmp_path, settings).path.read_bytes() == CONTENT
    assert server.ranges_of("/8.pt") == [None, None]


def test_a_server_that_ignores_ranges_is_read_from_the_start(
    server: FileServer, settings: DownloadSettings, tmp_path: Path
) -> None:
    served = server.put("/8.pt", CONTENT, ("cut", 100_000))
    served.ranges = False
    assert download(remote(server), tmp_path, settings).path.read_bytes() == CONTENT
    assert server.ranges_of("/8.pt") == [None, "bytes=100000-"]


@pytest.mark.parametrize("fault", [("stall", 50_000), ("drip",)])
def test_a_slow_reply_is_given_up_and_asked_for_again(
    server: FileServer, settings: DownloadSettings, tmp_path: Path, fault: Any
) -> None:
    server.put("/8.pt", CONTENT, fault)
    impatient = replace(settings, timeout_s=0.5, attempts=20)
    assert download(remote(server), tmp_path, impatient).path.read_bytes() == CONTENT
    assert len(server.requests) >= 2  # on a slow machine a good reply may be slow as well


def test_passing_errors_are_waited_out_longer_each_time(
    server: FileServer, settings: DownloadSettings, tmp_path: Path, waits: list[float]
) -> None:
    busy = ("status", 503, {"Retry-After": "7"})
    server.put("/8.pt", CONTENT, ("status", 500), ("status", 502), ("status", 500), busy)
    patient = replace(settings, attempts=6)
    assert download(remote(server), tmp_path, patient).path.read_bytes() == CONTENT
    for wait, middle in zip(waits[:3], (0.5, 1.0, 2.0), strict=True):
        assert 0.5 * middle <= wait <= 1.5 * middle
    assert waits[3] == 7.0


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([("status", 500)] * 9, r"the server answered 500 .*attempt 3, given up"),
        ([("cut", 0)] * 9, r"the reply ended after 0 of 300000 bytes \(attempt 3, given up\)"),
        ([("status", 403)], r"is not permitted \(403"),
        ([("status", 401)], r"needs permission \(401"),
        ([("no length",)], "does not say how long the file is"),
        ([("redirect", "http://example.invalid/8.pt")], "refused: expected https"),
        ([("redirect", "file:///etc/hostname")], "refused|not allowed"),
    ],
)
def test_what_cannot_be_fetched_is_a_clear_error(
    server: FileServer, settings: DownloadSettings, tmp_path: Path, faults: list[Any], message: str
) -> None:
    server.put("/8.pt", CONTENT, *faults)
    with pytest.raises(PullError, match=message):
        download(remote(server), tmp_path, settings)
    assert not (tmp_path / "8.pt").exists()


def test_nobody_there(settings: DownloadSettings, tmp_path: Path) -> None:
    server = FileServer()
    server.stop()
    with pytest.raises(PullError, match=r"no reply: .*attempt 3, given up"):
        download(remote(server), tmp_path, settings)


@pytest.mark.parametrize("known", ["sha256", "git_sha1", "md5"])
def test_a_damaged_file_is_fetched_once_more_and_then_refused(
    server: FileServer, settings: DownloadSettings, tmp_path: Path, known: str
) -> None:
    sums = {"sha256": hashlib.sha256(CONTENT).hexdigest(), "git_sha1": git_sha1(CONTENT)}
    expected = {} if known == "md5" else {known: sums[known]}
    headers = {"Content_MD5": md5_header(CONTENT)} if known == "md5" else {}
    server.put("/8.pt", CONTENT, ("damage",), **headers)
    fetched = download(remote(server, **expected), tmp_path, settings)
    assert fetched.path.read_bytes() == CONTENT
    assert fetched.verified == (known.partition("_")[0],)
    fetched.path.unlink()
    server.put("/8.pt", CONTENT, ("damage",), ("damage",), **headers)
    with pytest.raises(PullError, match=r"its (sha256|git|md5) checksum is \w+, the server said \w+; fetched twice"):
        download(remote(server, **expected), tmp_path, settings)
    assert list(tmp_path.iterdir()) == []


def test_the_checksum_of_the_whole_is_known_when_a_part_was_fetched(
    server: FileServer, settings: DownloadSettings, tmp_path: Path
) -> None:
    good = md5_header(CONTENT)
    server.put("/8.pt", CONTENT, ("cut", 1000), x_ms_blob_content_md5=good)
    assert download(remote(server), tmp_path, settings).verified == ("md5",)


def test_another_size_than_announced_is_refused(server: FileServer, settings: DownloadSettings, tmp_path: Path) -> None:
    server.put("/8.pt", CONTENT)
    with pytest.raises(PullError, match="has 300000 bytes, expected 300001"):
        download(remote(server, size=300_001), tmp_path, settings)


def test_a_full_disk_keeps_what_was_fetched(
    server: FileServer, settings: DownloadSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("/8.pt", CONTENT, ("cut", 100_000))
    calls = []

    def full(name: str, length: int, total: int | None) -> None:
        calls.append(length)
        if length > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        download(remote(server), tmp_path, settings, full)
    assert (tmp_path / "8.pt.part").stat().st_size >= 100_000
    assert download(remote(server), tmp_path, settings).path.read_bytes() == CONTENT


def test_addresses() -> None:
    for good in ("https://example.org/a", "http://127.0.0.1:80/a", "http://localhost/a", "http://[::1]/a"):
        check_url(good)
    for bad in ("http://example.org/a", "ftp://example.org/a", "file:///etc/passwd", "https:///a", "/a"):
        with pytest.raises(PullError, match="refused"):
            check_url(bad)


def test_json_replies(server: FileServer, settings: DownloadSettings) -> None:
    server.put("/a", b'{"a": 1}', ("cut", 3), ("status", 500))
    assert get_json(server.address + "/a", settings) == {"a": 1}
    server.put("/b", b"<html>")
    with pytest.raises(PullError, match="expected JSON, found b'<html>'"):
        get_json(server.address + "/b", settings)
