"""Unclean text: what is harmless is read right, and what cannot be read is named with its file and line, or skipped."""

import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.documents import DocumentFile, read_documents

pytestmark = pytest.mark.any_cpu

GOOD = b'{"text": "good"}\n'
LARGE = GOOD + json.dumps({"text": os.urandom(200_000).hex()}).encode() + b"\n" + GOOD


def texts(path: Path) -> list[str]:
    return [document.text for document in read_documents([path])]


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def zst(content: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(content))


def parquet(values: Any) -> bytes:
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written = io.BytesIO()
    files.write_table(arrow.table({"text": values}), written, compression="gzip")
    return written.getvalue()


HARMLESS: dict[str, tuple[str, bytes, list[str]]] = {
    "a byte order mark is no text": ("a.jsonl", b"\xef\xbb\xbf" + GOOD, ["good"]),
    "a byte order mark between joined files is no text": ("a.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, ["good"] * 2),
    "a byte order mark of a text file is no text": ("a.txt", b"\xef\xbb\xbfgood", ["good"]),
    "blank lines are no records": ("a.jsonl", b"\n" + GOOD + b" \t\n\n" + GOOD + b"\n", ["good"] * 2),
    "line ends of Windows end lines": ("a.jsonl", GOOD.replace(b"\n", b"\r\n") * 2, ["good"] * 2),
    "line ends of Windows are newlines in a text": ("a.md", b"one\r\ntwo\r\n", ["one\ntwo\n"]),
    "a last line without an end is a record": ("a.jsonl", GOOD + GOOD.strip(), ["good"] * 2),
    "a line separator of Unicode ends no line": ("a.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
    "NUL is text": ("a.jsonl", b'{"text": "a\\u0000b"}\n', ["a\0b"]),
    "NUL is text in a text file": ("a.txt", b"a\0b", ["a\0b"]),
    "a pair of surrogates is a character": ("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "half a pair becomes U+FFFD": ("a.jsonl", b'{"text": "a\\ud83db\\ude00"}\n', ["a\ufffdb\ufffd"]),
    "an infinite number elsewhere is harmless": ("a.jsonl", b'{"n": 1e999, "text": "good"}\n', ["good"]),
    "an empty file has no records": ("a.jsonl", b"", []),
    "an empty text file is an empty document": ("a.txt", b"", [""]),
    "an empty compressed file has no records": ("a.jsonl.gz", gzip.compress(b""), []),
    "compressed pieces one after the other are one text": (
        "a.jsonl.gz",
        gzip.compress(GOOD) + gzip.compress(GOOD),
        ["good"] * 2,
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless(name: str, tmp_path: Path) -> None:
    file, content, expected = HARMLESS[name]
    assert texts(write(tmp_path, file, content)) == expected


def damaged(content: bytes) -> bytes:
    return content[:500] + b"\0" * 40 + content[540:]


# Each file has a good record first, a bad document at the place, and what follows it (lost where the file is damaged).
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "Latin-1": (b'{"text": "caf\xe9"}', r"byte 0xe9 is not UTF-8"),
    "a surrogate that is encoded": (b'{"text": "\xed\xa0\xbd"}', r"byte 0xed is not UTF-8"),
    "cut": (b'{"text": "goo', r"expected a JSON object with a string `text`: Unterminated string .* \(column 10\)"),
    "not JSON": (b"plain text", r"expected a JSON object with a string `text`: Expecting value \(column 1\)"),
    "zeros that a crash left": (b"\0" * 300, r"expected a JSON object"),
    "null": (b'{"text": null}', r"`text` is NoneType, expected a string"),
    "a number": (b'{"text": 3}', r"`text` is int, expected a string"),
    "a list of texts": (b'{"text": ["a"]}', r"`text` is list, expected a string"),
    "another field": (b'{"txt": "a"}', r"expected a JSON object with a string `text`, found the fields txt"),
    "a record that is a list": (b'["text"]', r"expected a JSON object with a string `text`, found list"),
    "a record that is a number": (b"7", r"expected a JSON object with a string `text`, found int"),
    "a record that is a string": (b'"text"', r"expected a JSON object with a string `text`, found str"),
    "a number of too many digits": (b'{"n": ' + b"9" * 5000 + b', "text": "a"}', r"Exceeds the limit \(4300 digits\)"),
    "too deep": (b"[" * 100_000, r"the JSON is nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(name: str, tmp_path: Path) -> None:
    line, message = BAD_LINES[name]
    path = write(tmp_path, "a.jsonl", GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {message}"):
        texts(path)
    bad = BadDocuments("skip")
    assert [document.text for document in DocumentFile(path, bad=bad)] == ["good"] * 2
    assert list(bad.reasons) == [f"{path}:2"]


def test_utf_16_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        with pytest.raises(ValueError, match=rf"{name}:1: this is UTF-16, expected UTF-8"):
            texts(write(tmp_path, name, GOOD.decode().encode("utf-16")))


def test_a_text_file_that_is_not_utf_8_is_one_bad_document(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"one\ntwo caf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: byte 0xe9 is not UTF-8"):
        texts(path)
    bad = BadDocuments("skip")
    assert list(DocumentFile(path, bad=bad)) == []
    assert bad.reasons == {f"{path}:2": "byte 0xe9 is not UTF-8"}


DAMAGED: dict[str, tuple[str, Any]] = {
    "cut .gz": ("a.jsonl.gz", lambda: gzip.compress(LARGE)[:-30_000]),
    "cut .xz": ("a.jsonl.xz", lambda: lzma.compress(LARGE)[:-30_000]),
    "cut .zst": ("a.jsonl.zst", lambda: zst(LARGE)[:-30_000]),
    "damaged .gz": ("a.jsonl.gz", lambda: damaged(gzip.compress(LARGE))),
    "damaged .xz": ("a.jsonl.xz", lambda: damaged(lzma.compress(LARGE))),
    "damaged .zst": ("a.jsonl.zst", lambda: zst(LARGE)[:9] + b"\xff" * 40),
    "plain text called .gz": ("a.jsonl.gz", lambda: GOOD),
    "plain text called .xz": ("a.jsonl.xz", lambda: GOOD),
    "plain text called .zst": ("a.jsonl.zst", lambda: GOOD),
    "empty .xz": ("a.jsonl.xz", lambda: b""),
    "a cut text file": ("a.txt.gz", lambda: gzip.compress(LARGE)[:-30_000]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_ends_where_the_damage_begins(name: str, tmp_path: Path) -> None:
    file, content = DAMAGED[name]
    path = write(tmp_path, file, content())
    with pytest.raises(ValueError, match=rf"{file}:\d: the file is cut or damaged here \(.+\)"):
        texts(path)
    bad = BadDocuments("skip")
    read = [document.text for document in DocumentFile(path, bad=bad)]
    assert read in ([], ["good"])
    assert list(bad.reasons) == [f"{path}:{len(read) + 1}"]
    if name in ("cut .gz", "cut .xz", "cut .zst"):
        assert read == ["good"]


def test_frames_of_zstandard_are_one_text(tmp_path: Path) -> None:
    empty_skippable_frame = bytes.fromhex("502a4d1800000000")
    path = write(tmp_path, "a.jsonl.zst", zst(GOOD) + empty_skippable_frame + zst(b"") + zst(GOOD))
    assert texts(path) == ["good"] * 2


def test_rows_of_parquet_that_are_no_text(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    values = arrow.array([b"good", b"caf\xe9", None, b"good"])
    as_strings = arrow.Array.from_buffers(arrow.string(), 4, values.buffers(), null_count=1)
    path = write(tmp_path, "a.parquet", parquet(as_strings))
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: .*can't decode byte 0xe9"):
        texts(path)
    bad = BadDocuments("skip")
    assert [document.text for document in DocumentFile(path, bad=bad)] == ["good"] * 2
    assert list(bad.reasons) == [f"{path}, row 2", f"{path}, row 3"]
    assert bad.reasons[f"{path}, row 3"] == "`text` is NoneType, expected a string"
    with pytest.raises(ValueError, match=r"b\.parquet, row 1: `text` is bytes, expected a string"):
        texts(write(tmp_path, "b.parquet", parquet(values)))


def test_a_damaged_parquet_file_ends_where_the_damage_begins(tmp_path: Path) -> None:
    content = parquet([os.urandom(2000).hex() for _ in range(20)])
    path = write(tmp_path, "a.parquet", damaged(content))
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: the file is cut or damaged here"):
        texts(path)
    bad = BadDocuments("skip")
    assert list(DocumentFile(path, bad=bad)) == []
    assert list(bad.reasons) == [f"{path}, row 1"]


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("folder.txt", "none.jsonl"):
        with pytest.raises(OSError, match=name):
            texts(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "secret.txt", b"good")
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"secret\.txt"):
        texts(path)


def test_kinds_and_labels_are_text(tmp_path: Path) -> None:
    records = [{"text": "a", "kind": 3, "lang": "\ud83d"}, {"text": "b", "kind": None}, {"text": "c", "kind": ["x"]}]
    path = write(tmp_path, "news-01.jsonl", b"".join(json.dumps(record).encode() + b"\n" for record in records))
    documents = list(read_documents([path]))
    assert [document.kind for document in documents] == ["3", "news", "news"]
    assert documents[0].labels == {"kind": "3", "lang": "\ufffd"}
    assert [document.place for document in documents] == [f"{path}:{line}" for line in (1, 2, 3)]
