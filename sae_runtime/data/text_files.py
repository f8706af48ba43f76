"""UTF-8 text files, plain or compressed. Python's own readers tell neither the line of a wrong byte nor a cut .zst."""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSED = (".xz", ".gz", ".zst")


class CutFile(Exception):
    """A .zst file is cut or damaged."""


DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, CutFile)
"""What reading a compressed file raises where it is cut, damaged or not compressed at all."""


def open_text(raw: IO[bytes], path: Path) -> IO[str]:
    """The text of an open file, decompressed as its suffix says. A byte order mark at the start is left out.

    A byte that is not UTF-8 becomes a lone surrogate, which `first_wrong_byte` finds. Reading raises DAMAGE.
    """
    binary: Any = raw
    if path.suffix == ".xz":
        binary = lzma.LZMAFile(raw)  # noqa: SIM115 (closed with the text)
    elif path.suffix == ".gz":
        binary = gzip.GzipFile(fileobj=raw)
    elif path.suffix == ".zst":
        zstandard = require("zstandard", "zstandard", f"{path} is compressed with zstandard, and reading it")
        binary = io.BufferedReader(_Pieces(_zstd_pieces(raw, zstandard)), 1 << 17)
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape")


def first_wrong_byte(text: str) -> tuple[int, str] | None:
    """Line (from 1) and description of the first byte of a text of `open_text` that is not UTF-8; None if all are."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
            return 1, "this is UTF-16, expected UTF-8"
        byte = ord(text[error.start]) & 0xFF
        return text.count("\n", 0, error.start) + 1, f"byte 0x{byte:02x} is not UTF-8"
    return None


def unicode_name(path: Path) -> str:
    """A file's name for records; bytes of it that are not UTF-8, which Linux allows, become U+FFFD."""
    return os.fsencode(path.name).decode(errors="replace")


def require(module: str, package: str, purpose: str) -> Any:
    """An optional package's module; ModuleNotFoundError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package}, which is not installed: pip install 'saeserve[train]'"
        ) from error


def _zstd_pieces(raw: IO[bytes], zstandard: Any) -> Iterator[bytes]:
    """The bytes of all frames. zstandard's own reader takes the end of a cut file for the end of the text."""
    frame = None
    while data := raw.read(1 << 16):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise CutFile(str(error)) from error
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise CutFile("Compressed file ended in the middle of a frame")


class _Pieces(io.RawIOBase):
    """Pieces of bytes, read as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        target = memoryview(buffer)
        n = min(len(target), len(self._rest))
        target[:n], self._rest = self._rest[:n], self._rest[n:]
        return n
