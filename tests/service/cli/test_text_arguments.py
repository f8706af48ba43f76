"""Texts from files and standard input: what is harmless is read right, and what cannot be read is one line."""

import argparse
import gzip
import io
import lzma
from pathlib import Path

import pytest

from service.cli.parser import CommandError
from service.cli.text_arguments import read_files, read_texts

HARMLESS = {
    "a byte order mark is no text": (b"\xef\xbb\xbfone", ["one"]),
    "line ends of Windows are newlines": (b"one\r\ntwo", ["one\ntwo"]),
    "NUL is text": (b"a\0b", ["a\0b"]),
    "a character outside of the first plane": ("\U0001f600".encode(), ["\U0001f600"]),
    "an empty file is an empty text": (b"", [""]),
}
LINES = {
    "a byte order mark is no text": (b"\xef\xbb\xbfone\ntwo", ["one", "two"]),
    "blank lines are no texts": (b"one\n \n\t\n\ntwo\n", ["one", "two"]),
    "line ends of Windows end lines": (b"one\r\n\r\ntwo\r\n", ["one", "two"]),
    "a line separator of Unicode ends no line": ("a\u2028b\nc\x85d\n".encode(), ["a\u2028b", "c\x85d"]),
    "a form feed ends no line": (b"a\x0cb\nc", ["a\x0cb", "c"]),
    "an empty file has no texts": (b"", []),
}
BAD = {
    "Latin-1": ("a.txt", b"one\ncaf\xe9\n", r"a\.txt:2: byte 0xe9 is not UTF-8"),
    "UTF-16": ("a.txt", "one".encode("utf-16"), r"a\.txt:1: this is UTF-16, expected UTF-8"),
    "a cut character": ("a.txt", "é".encode()[:1], r"a\.txt:1: byte 0xc3 is not UTF-8"),
    "an encoded surrogate": ("a.txt", b"\xed\xa0\xbd", r"a\.txt:1: byte 0xed is not UTF-8"),
    "cut .gz": ("a.gz", gzip.compress(b"one")[:-9], r"a\.gz: Compressed file ended"),
    "plain text called .gz": ("a.gz", b"one", r"a\.gz: Not a gzipped file"),
    "plain text called .xz": ("a.xz", b"one", r"a\.xz: Input format not supported"),
}


@pytest.mark.parametrize("source", ["file", "standard input"])
@pytest.mark.parametrize(("lines", "name"), [*((False, name) for name in HARMLESS), *((True, name) for name in LINES)])
def test_harmless(source: str, lines: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content, expected = (LINES if lines else HARMLESS)[name]
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    assert list(read_files([str(file) if source == "file" else "-"], lines)) == expected


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path):
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CommandError, match=f"^cannot read .*{message}"):
        list(read_files([str(tmp_path / file)], lines=True))


def test_standard_input_that_is_not_utf_8(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9")))
    with pytest.raises(CommandError, match=r"^cannot read -:2: byte 0xe9 is not UTF-8$"):
        list(read_files(["-"], lines=False))


def test_a_folder_is_named(tmp_path: Path):
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    with pytest.raises(CommandError, match=r"cannot read .*folder\.txt: .*Is a directory"):
        list(read_files([str(folder)], lines=False))


def test_compressed_files_are_decompressed(tmp_path: Path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"two"))
    assert list(read_files([str(tmp_path / "a.txt.gz"), str(tmp_path / "a.txt.xz")], lines=False)) == ["one", "two"]


def test_no_text_is_wrong_usage():
    with pytest.raises(CommandError, match="no text; try: saeserve score") as raised:
        read_texts(argparse.Namespace(text=[], file=[], lines=False), "score")
    assert raised.value.exit_code == 2
