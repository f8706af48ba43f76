"""Opens the SQLite files of a catalogue, and turns what is wrong with them into CatalogueErrors that name the file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_runtime.catalogue.schema import SCHEMA_VERSION
from sae_runtime.errors import CatalogueError


@contextmanager
def errors_of(path: Path, kind: str) -> Iterator[None]:
    """Turns errors of SQLite, and of contents that do not fit the schema, into CatalogueErrors.

    `kind` says what the file should be, such as "a catalogue of features".
    """
    try:
        yield
    except sqlite3.Error as error:
        raise CatalogueError(f"{path}: cannot be read as {kind}: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        if isinstance(error, CatalogueError):
            raise
        raise CatalogueError(f"{path}: what it holds is not that of {kind}: {error}") from error


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection for several threads, which take turns; `mode` as in SQLite's URIs, such as "ro"."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False, isolation_level=None, timeout=5
    )


def check_version(connection: sqlite3.Connection, path: Path, kind: str, application_id: int) -> None:
    """CatalogueError unless the file is of this kind, and of a version that can be read."""
    (found,) = connection.execute("PRAGMA application_id").fetchone()
    if found != application_id:
        raise CatalogueError(f"{path}: is another application's SQLite file, expected {kind}")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise CatalogueError(
            f"{path}: has schema version {version}, this saeserve reads up to {SCHEMA_VERSION}; upgrade it"
        )
