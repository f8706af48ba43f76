"""Shards on disk: written whole, flushed and checksummed; read by memory-mapping."""

from __future__ import annotations

import hashlib
import os
from array import array
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sae_runtime.data.token_folder.manifest import TokenShard

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class OpenShard:
    """Documents on their way into a shard, in memory in the form that they have on disk."""

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        code = next(code for code in "HIL" if array(code).itemsize == self._dtype.itemsize)
        self._tokens, self._ends = array(code), array("q")

    def __len__(self) -> int:
        """Tokens in it."""
        return len(self._tokens)

    def add(self, document: list[int]) -> None:
        self._tokens.extend(document)
        self._ends.append(len(self._tokens))

    def write(self, folder: Path, name: str) -> TokenShard:
        """Writes both files, flushed to disk.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        tokens, ends = np.frombuffer(self._tokens, self._dtype), np.frombuffer(self._ends, np.int64)
        paths = folder / f"{name}.npy", folder / f"{name}.ends.npy"
        for path, values in zip(paths, (tokens, ends), strict=True):
            with path.open("wb") as file:
                np.save(file, values)
                file.flush()
                os.fsync(file.fileno())
        return TokenShard(
            name=name,
            documents=len(ends),
            tokens=len(tokens),
            bytes=(paths[0].stat().st_size, paths[1].stat().st_size),
            sha256=(sha256_of(paths[0]), sha256_of(paths[1])),
        )


def map_shard(folder: Path, shard: TokenShard, dtype: str) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """Memory-mapped tokens [shard.tokens] and ends [shard.documents].

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another size, type or shape than the manifest says.
    """
    check_sizes(folder, shard)
    arrays = []
    for file, length, kind in zip(shard.files, (shard.tokens, shard.documents), (dtype, "int64"), strict=True):
        # An empty file cannot be mapped.
        array = np.load(folder / file, mmap_mode="r" if length else None, allow_pickle=False)
        if array.shape != (length,) or array.dtype != np.dtype(kind):
            raise ValueError(f"{folder / file} holds {array.dtype} {list(array.shape)}, expected {kind} [{length}]")
        arrays.append(array)
    return arrays[0], arrays[1]


def check_sizes(folder: Path, shard: TokenShard) -> None:
    """FileNotFoundError or ValueError unless both files exist with the sizes in the manifest."""
    for file, expected in zip(shard.files, shard.bytes, strict=True):
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        if (size := path.stat().st_size) != expected:
            raise ValueError(f"{path} has {size} bytes, expected {expected}: it is cut short or of another run")


def check_sums(folder: Path, shard: TokenShard) -> None:
    """ValueError unless both files have the checksums in the manifest."""
    check_sizes(folder, shard)
    for file, expected in zip(shard.files, shard.sha256, strict=True):
        if (digest := sha256_of(folder / file)) != expected:
            raise ValueError(f"{folder / file} has sha256 {digest}, expected {expected}: it was changed or damaged")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
