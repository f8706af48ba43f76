"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into, "<path>.tmp"; at the end of the block it is flushed to disk and renamed to `path`.

    After an error in the block, what was at `path` is as it was. Not for two writers of one path at once.

    Raises:
        OSError: the file cannot be written, for example as the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write files into; at the end of the block it is flushed to disk and renamed to `path`.

    With `overwrite` an existing `path` is moved aside first and removed afterwards, else FileExistsError. After an
    error in the block nothing is left.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; remove it or overwrite it on purpose")
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield building
        for file in building.iterdir():
            file.chmod(0o644)
            _flush(file)
        building.chmod(0o755)
        _flush(building)
        _put_in_place(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def flush_folder(path: Path) -> None:
    """Makes what was renamed in a folder survive a power cut, where the file system can do that."""
    with suppress(OSError):
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(building: Path, path: Path) -> None:
    aside: Path | None = None
    if path.exists():
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        os.rename(path, aside)
    try:
        os.rename(building, path)
    except OSError:
        if aside is not None:
            os.rename(aside, path)
        raise
    flush_folder(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
