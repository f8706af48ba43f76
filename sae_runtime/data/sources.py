"""Where documents come from, by name: files, folders of files, and Hugging Face data sets on disk or on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.documents import TEXT_SUFFIXES, Document, DocumentFile, document_of
from sae_runtime.data.text_files import require, unicode_name

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w.-]+)?")
_UNKNOWN_SIZE = 1 << 30  # only decides how fast a data set is read beside others


class DocumentSource(Protocol):
    """Documents in a fixed order; iterate over it once at a time."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes, at least roughly: sources are mixed in proportion to it."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Distinguishes this source from another of the same name."""
        ...

    def share_read(self) -> float:
        """Share of it that was read, 0 to 1."""
        ...

    def __iter__(self) -> Iterator[Document]: ...


def find_sources(
    names: Sequence[str], *, text_field: str = "text", split: str = "train", bad: BadDocuments | None = None
) -> list[DocumentSource]:
    """The sources that names stand for, in order.

    Args:
        names: a file (see read_documents); a folder that `datasets` saved; any other folder, for all files in it that
            can be read; or the name of a data set on the Hugging Face hub, "owner/name", with "@configuration" after it
            where the data set has several.
        text_field: the field or column that holds the text.
        split: which split of a data set.
        bad: what becomes of documents that cannot be read; the first is an error if not given.

    Raises:
        FileNotFoundError: there is no such file or folder, and it is no name of a data set.
        ModuleNotFoundError: a data set without the package `datasets`.
        ValueError: a folder without files that can be read, a data set without that split or column.
    """
    bad = bad or BadDocuments()
    sources: list[DocumentSource] = []
    for name in names:
        path = Path(name)
        if path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            sources.append(_saved_dataset(path, text_field, split, bad))
        elif path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_text(file)]
            if not files:
                raise ValueError(
                    f"{path}: no file in it ends in {', '.join(TEXT_SUFFIXES)}, and it is no saved data set"
                )
            sources += [DocumentFile(file, text_field, bad) for file in files]
        elif path.is_file():
            sources.append(DocumentFile(path, text_field, bad))
        elif _HUB_NAME.fullmatch(name) and not _is_text(path):
            sources.append(_hub_dataset(name, text_field, split, bad))
        else:
            raise FileNotFoundError(f"no file, folder or data set {name!r}")
    return sources


def _is_text(path: Path) -> bool:
    return any(suffix in TEXT_SUFFIXES for suffix in path.suffixes[-2:])


@dataclass
class _Dataset:
    """Rows of a Hugging Face data set."""

    name: str
    size: int
    identity: dict[str, Any]
    rows: Any
    n_rows: int
    """0 if not known."""
    text_field: str
    bad: BadDocuments
    _read: int = field(default=0, init=False)

    def share_read(self) -> float:
        return self._read / self.n_rows if self.n_rows else 0.0

    def __iter__(self) -> Iterator[Document]:
        kind = Path(self.name).name
        self._read = 0
        rows = iter(self.rows)
        while True:
            place = f"data set {self.name}, row {self._read + 1}"
            try:
                row = next(rows, None)
            except Exception as error:  # damaged files, lost connections: they come in many types
                raise ValueError(f"{place}: cannot be read: {error}") from error
            if row is None:
                return
            self._read += 1
            if self.text_field not in row:
                raise ValueError(f"{place}: has {', '.join(row)}; expected `{self.text_field}`")
            with self.bad.at(place):
                yield document_of(row, self.text_field, kind, place)


def _saved_dataset(path: Path, text_field: str, split: str, bad: BadDocuments) -> _Dataset:
    datasets = require("datasets", "datasets", f"{path} is a saved data set, and reading it")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # a folder that is none, or damaged: it comes in many types
        raise ValueError(f"{path} cannot be read as a saved data set: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{path} has splits {', '.join(loaded)}; expected {split!r}")
        loaded = loaded[split]
    if text_field not in loaded.column_names:
        raise ValueError(f"{path} has columns {', '.join(loaded.column_names)}; expected a column `{text_field}`")
    kept = [column for column in (text_field, "kind") if column in loaded.column_names]
    loaded = loaded.select_columns(kept)
    size = sum(file.stat().st_size for file in path.rglob("*.arrow"))
    identity = {"name": unicode_name(path), "split": split, "rows": len(loaded), "bytes": size}
    return _Dataset(unicode_name(path), size, identity, loaded, len(loaded), text_field, bad)


def _hub_dataset(name: str, text_field: str, split: str, bad: BadDocuments) -> _Dataset:
    datasets = require("datasets", "datasets", f"no file or folder is called {name!r}; reading a data set of the hub")
    repository, _, configuration = name.partition("@")
    try:
        # Streaming: nothing but what is read is downloaded. Code in a repository is never run.
        rows = datasets.load_dataset(repository, configuration or None, split=split, streaming=True)
    except Exception as error:  # connection errors, missing repositories and wrong names come in many types
        raise FileNotFoundError(
            f"no file or folder is called {name!r}, and the data set of that name cannot be read from the hub: {error}"
        ) from error
    info = rows.info.splits.get(split) if rows.info.splits else None
    identity = {
        "name": name,
        "split": split,
        "version": str(rows.info.version or ""),
        "rows": getattr(info, "num_examples", 0),
    }
    size = getattr(info, "num_bytes", 0) or _UNKNOWN_SIZE
    return _Dataset(name, size, identity, rows, getattr(info, "num_examples", 0) or 0, text_field, bad)
