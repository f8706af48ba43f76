"""Documents from text files and data sets: what the offline job and the builtin model's script read."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_COMPRESSED = (".xz", ".gz", ".zst")
EXPECTED = "expected .txt, .md, .jsonl (each also .xz, .gz or .zst) or .parquet"


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    kind: str
    """The record's own `kind`, else the file's name without its suffixes and shard number."""
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The other string fields of a JSONL record, such as `lang` or `author`: evaluation makes probe tasks from them."""


def read_documents(paths: Sequence[str | Path], *, text_field: str = "text") -> Iterator[Document]:
    """Yields the documents of text files (.txt, .md: one document a file), JSONL files (one a line) and parquet files.

    Text and JSONL may be compressed (.xz, .gz, .zst). Records hold the text in `text_field`.

    Raises:
        FileNotFoundError: a path does not exist.
        ModuleNotFoundError: .zst or .parquet without the package that reads it.
        ValueError: a file's suffix is not known, or a record has no string there; names file and line.
    """
    for path in map(Path, paths):
        yield from DocumentFile(path, text_field)


@dataclass
class DocumentFile:
    """The documents of one file; iterate over it once at a time."""

    path: Path
    text_field: str = "text"
    _raw: IO[bytes] | None = field(default=None, init=False, repr=False)
    _share: float = field(default=0.0, init=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    @property
    def identity(self) -> dict[str, Any]:
        """Distinguishes this file from another of the same name."""
        return {"name": self.name, "bytes": self.size, "modified": self.path.stat().st_mtime_ns}

    def share_read(self) -> float:
        """Share of the file that was read, 0 to 1."""
        if self._raw is not None and not self._raw.closed:
            return min(1.0, self._raw.tell() / max(self.size, 1))
        return self._share

    def __iter__(self) -> Iterator[Document]:
        kind = self.path.name.split(".")[0].rstrip("-0123456789") or self.path.name
        suffix = next((s for s in reversed(self.path.suffixes) if s not in _COMPRESSED), "")
        if suffix == ".parquet" and self.path.suffix == suffix:
            yield from self._read_parquet(kind)
            self._share = 1.0
            return
        if suffix not in TEXT_SUFFIXES:
            raise ValueError(f"{self.path}: {EXPECTED}, found {self.path.name!r}")
        with self.path.open("rb") as self._raw, _decompressed(self._raw, self.path) as lines:
            if suffix == ".jsonl":
                for number, line in enumerate(lines, 1):
                    yield self._record(line, number, kind)
            else:
                yield Document(lines.read(), kind)
        self._share = 1.0

    def _record(self, line: str, number: int, kind: str) -> Document:
        try:
            record = json.loads(line)
            text = record[self.text_field]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}:{number}: expected a JSON object with a string `{self.text_field}`: {error}"
            ) from error
        document = document_of(text, record.get("kind", kind), self.text_field, f"{self.path}:{number}")
        labels = {name: v for name, v in record.items() if name != self.text_field and isinstance(v, str)}
        return replace(document, labels=labels)

    def _read_parquet(self, kind: str) -> Iterator[Document]:
        parquet = require("pyarrow.parquet", "pyarrow", f"{self.path} is a parquet file, and reading it")
        try:
            file = parquet.ParquetFile(self.path)
        except OSError as error:
            if not self.path.exists():
                raise
            raise ValueError(f"{self.path} is not a parquet file: {error}") from error
        except Exception as error:  # pyarrow.lib.ArrowInvalid is a ValueError without the file's name
            raise ValueError(f"{self.path} is not a parquet file: {error}") from error
        with file:
            columns = file.schema_arrow.names
            if self.text_field not in columns:
                raise ValueError(f"{self.path} has columns {', '.join(columns)}; expected a column `{self.text_field}`")
            columns_to_read = [column for column in (self.text_field, "kind") if column in columns]
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns_to_read):
                for record in batch.to_pylist():
                    number += 1
                    self._share = number / file.metadata.num_rows
                    where = f"{self.path}, row {number}"
                    yield document_of(record[self.text_field], record.get("kind") or kind, self.text_field, where)


def document_of(text: Any, kind: str, text_field: str, where: str) -> Document:
    """A document from the text of a record.

    Raises:
        ValueError: the text is not a string; the message begins with `where`.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: `{text_field}` is {type(text).__name__}, expected a string")
    return Document(text, kind)


def require(module: str, package: str, purpose: str) -> Any:
    """An optional package's module; ModuleNotFoundError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package}, which is not installed: pip install 'saeserve[train]'"
        ) from error


def _decompressed(raw: IO[bytes], path: Path) -> IO[str]:
    opener: Callable[..., IO[str]] = _plain
    if path.suffix == ".xz":
        opener = lzma.open
    elif path.suffix == ".gz":
        opener = gzip.open
    elif path.suffix == ".zst":
        opener = require("zstandard", "zstandard", f"{path} is compressed with zstandard, and reading it").open
    return opener(raw, "rt", encoding="utf-8")


def _plain(raw: IO[bytes], _: str, encoding: str) -> IO[str]:
    return io.TextIOWrapper(raw, encoding=encoding)


def mix(sources: Iterable[tuple[int, Iterator[Document]]]) -> Iterator[Document]:
    """Documents of all sources, each drawn from in proportion to its size, so that every stretch mixes them all.

    The next document comes from the source that is least far read, measured in characters read per byte of its size.
    """
    sizes, readers = {}, {}
    for i, (size, documents) in enumerate(sources):
        sizes[i], readers[i] = max(size, 1), documents
    read = dict.fromkeys(readers, 0)
    while readers:
        chosen = min(readers, key=lambda i: read[i] / sizes[i])
        document = next(readers[chosen], None)
        if document is None:
            del readers[chosen]
            continue
        read[chosen] += len(document.text) + 1
        yield document
