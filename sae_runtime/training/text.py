"""Documents from text files: what the offline job and the builtin model's script read."""

import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    kind: str
    """The record's own `kind`, else the file's name without its suffixes and shard number."""


def read_documents(paths: Sequence[str | Path]) -> Iterator[Document]:
    """Yields the documents of text files (.txt, .md: one document a file) and JSONL files (.jsonl, one a line).

    Either may be compressed (.xz, .gz). JSONL records hold the text in `text`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file's suffix is not known, or a JSONL line has no string `text`; names file and line.
    """
    for path in map(Path, paths):
        suffix = next((s for s in reversed(path.suffixes) if s not in _OPENERS), "")
        kind = path.name.split(".")[0].rstrip("-0123456789") or path.name
        with _open_text(path) as lines:
            if suffix == ".jsonl":
                yield from _read_jsonl(path, lines, kind)
            elif suffix in (".txt", ".md"):
                yield Document(lines.read(), kind)
            else:
                raise ValueError(f"{path}: expected .txt, .md or .jsonl (optionally .xz or .gz), found {path.name!r}")


def _open_text(path: Path) -> IO[str]:
    opener = _OPENERS.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8")  # type: ignore[operator, no-any-return]


def _read_jsonl(path: Path, lines: IO[str], kind: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            text = record["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected a JSON object with a string `text`: {error}") from error
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: `text` is {type(text).__name__}, expected a string")
        yield Document(text, record.get("kind", kind))
