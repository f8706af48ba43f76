"""Documents from text files and data sets: what the offline job and the builtin model's script read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.text_files import COMPRESSED, DAMAGE, first_wrong_byte, open_text, require, unicode_name

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
EXPECTED = "expected .txt, .md, .jsonl (each also .xz, .gz or .zst) or .parquet"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    kind: str
    """The record's own `kind`, else the file's name without its suffixes and shard number."""
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The other string fields of a JSONL record, such as `lang` or `author`: evaluation makes probe tasks from them."""
    place: str = field(default="", compare=False)
    """File and line, or data set and row."""


def read_documents(paths: Sequence[str | Path], *, text_field: str = "text") -> Iterator[Document]:
    """Yields the documents of text files (.txt, .md: one document a file), JSONL files (one a line) and parquet files.

    Text and JSONL may be compressed (.xz, .gz, .zst). Records hold the text in `text_field`. Blank lines, Windows' line
    ends and byte order marks are no part of the text.

    Raises:
        FileNotFoundError: a path does not exist.
        ModuleNotFoundError: .zst or .parquet without the package that reads it.
        ValueError: a file's suffix is not known, or a document cannot be read; names file and line.
    """
    for path in map(Path, paths):
        yield from DocumentFile(path, text_field)


@dataclass
class DocumentFile:
    """The documents of one file; iterate over it once at a time."""

    path: Path
    text_field: str = "text"
    bad: BadDocuments = field(default_factory=BadDocuments)
    """What becomes of documents that cannot be read. A file that is damaged ends where the damage begins."""
    _raw: IO[bytes] | None = field(default=None, init=False, repr=False)
    _share: float = field(default=0.0, init=False)

    @property
    def name(self) -> str:
        return unicode_name(self.path)

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
        kind = self.name.split(".")[0].rstrip("-0123456789") or self.name
        suffix = next((s for s in reversed(self.path.suffixes) if s not in COMPRESSED), "")
        if suffix == ".parquet" and self.path.suffix == suffix:
            yield from self._read_parquet(kind)
        elif suffix in TEXT_SUFFIXES:
            with self.path.open("rb") as self._raw, open_text(self._raw, self.path) as lines:
                yield from self._read_text(lines, kind, is_jsonl=suffix == ".jsonl")
        else:
            raise ValueError(f"{self.path}: {EXPECTED}, found {self.path.name!r}")
        self._share = 1.0

    def _read_text(self, lines: IO[str], kind: str, *, is_jsonl: bool) -> Iterator[Document]:
        number = 0
        try:
            if not is_jsonl:
                text = lines.read()
                line, problem = first_wrong_byte(text) or (1, "")
                if problem:
                    self.bad.refuse(f"{self.path}:{line}", problem)
                else:
                    yield Document(text, kind, place=str(self.path))
                return
            for number, line_text in enumerate(lines, 1):
                if line_text.strip():
                    place = f"{self.path}:{number}"
                    with self.bad.at(place):
                        yield document_of(_parsed(line_text, self.text_field), self.text_field, kind, place)
        except DAMAGE as error:
            self.bad.refuse(f"{self.path}:{number + 1}", f"the file is cut or damaged here ({error})")

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
            names = file.schema_arrow.names
            if self.text_field not in names:
                raise ValueError(f"{self.path} has columns {', '.join(names)}; expected a column `{self.text_field}`")
            names = [name for name in (self.text_field, "kind") if name in names]
            batches = file.iter_batches(batch_size=256, columns=names)
            number = 0
            while True:
                try:
                    batch = next(batches, None)
                except (OSError, ValueError) as error:
                    self.bad.refuse(f"{self.path}, row {number + 1}", f"the file is cut or damaged here ({error})")
                    return
                if batch is None:
                    return
                for row in range(batch.num_rows):
                    number += 1
                    self._share = number / file.metadata.num_rows
                    place = f"{self.path}, row {number}"
                    with self.bad.at(place):  # a string may not be UTF-8, which only its conversion finds
                        record = {name: batch.column(name)[row].as_py() for name in names}
                        yield document_of(record, self.text_field, kind, place)


def document_of(record: Mapping[str, Any], text_field: str, kind: str, place: str) -> Document:
    """A document from a record.

    JSON can spell half of a surrogate pair, which no encoding of text can hold: it becomes U+FFFD.

    Args:
        kind: the document's kind, if the record has none.

    Raises:
        ValueError: the text is not a string.
    """
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"`{text_field}` is {type(text).__name__}, expected a string")
    labels = {name: _whole(v) for name, v in record.items() if name != text_field and isinstance(v, str)}
    if isinstance(record.get("kind"), int):
        labels["kind"] = str(record["kind"])
    return Document(_whole(text), labels.get("kind") or kind, labels, place)


def _parsed(line: str, text_field: str) -> Mapping[str, Any]:
    """The record of a line of JSONL. ValueError: it is none, or without text."""
    if (wrong := first_wrong_byte(line)) is not None:
        raise ValueError(wrong[1])
    try:
        record = json.loads(line.strip("\ufeff\r\n"))  # files with byte order marks may have been joined
    except json.JSONDecodeError as error:
        raise ValueError(
            f"expected a JSON object with a string `{text_field}`: {error.msg} (column {error.colno})"
        ) from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if not isinstance(record, dict) or text_field not in record:
        raise ValueError(f"expected a JSON object with a string `{text_field}`, found {_shown(record)}")
    return record


def _shown(value: Any) -> str:
    return f"the fields {', '.join(value) or 'none'}" if isinstance(value, dict) else type(value).__name__


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return _LONE_SURROGATE.sub("\ufffd", text)
    return text


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
