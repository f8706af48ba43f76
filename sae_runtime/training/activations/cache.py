"""An optional cache of activations on disk, for later epochs and for other trainings on the same text.

An entry is one pass of the backbone at one site, found by the hash of the pass's token rows. So data, context length,
cutting of rows and order are part of the key by their effect: another run finds an entry exactly when it would compute
the same pass. What tokens do not say is in the name of the entry's group: backbone and its dtype, site, stored dtype.

CACHE/<group>/group.json   what the group holds, for people
CACHE/<group>/used         touched when a run opens the group
CACHE/<group>/<hash>.pass  one pass: magic, CRC-32, length, then a safetensors file with one tensor

A file appears by renaming, and its checksum is verified on reading: a killed run, a full disk or a damaged file costs a
recomputed pass, never a wrong number. Several runs may use one cache at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site

_FORMAT = 1
_HEADER = struct.Struct("<4sIQ")  # magic, CRC-32 of the rest, its length
_MAGIC = b"SAEc"
_ABANDONED_S = 3600.0  # a temporary file of this age was left by a killed run
_RECOUNT_WRITES = 256  # other runs write too: the folder is counted again after this many writes


@dataclass(frozen=True)
class CacheGroup:
    """What a cache holds for one backbone, site and dtype."""

    name: str
    description: dict[str, Any]
    bytes: int
    passes: int
    used: float
    """When a run last opened it, seconds since the epoch."""


class ActivationCache:
    """The part of a cache folder that belongs to one backbone and some sites. Not for several threads at once."""

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        sites: Sequence[Site],
        *,
        dtype: torch.dtype,
        max_bytes: int,
        skip_first: bool = False,
    ) -> None:
        """Args:
        dtype: of the stored activations.
        max_bytes: bound on the whole folder. Where it is reached, groups of other runs make room, the one unused
            for the longest time first; then nothing more is added: what is read in a circle is served best by
            keeping what is there.
        skip_first: passes without each row's first token.

        Raises:
            OSError: the folder cannot be made.
        """
        self._folder = folder
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._groups: dict[Site, Path] = {}
        for site in sites:
            description = {
                "format": _FORMAT,
                "backbone": backbone.name,
                "fingerprint": backbone.fingerprint,
                "computed_in": str(backbone.dtype).removeprefix("torch."),
                "site": str(site),
                "stored_as": str(dtype).removeprefix("torch."),
                "skip_first": skip_first,
            }
            key = {name: value for name, value in description.items() if name != "backbone"}
            digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
            group = folder / f"{site}-{description['stored_as']}-{digest}"
            group.mkdir(parents=True, exist_ok=True)
            (group / "group.json").write_text(json.dumps(description, indent=1))
            (group / "used").touch()
            self._groups[site] = group
        self._full = False
        self._written = 0
        self._bytes = self._count()
        self.hits = self.misses = 0

    def get(self, rows: Sequence[Sequence[int]]) -> dict[Site, Tensor] | None:
        """Stored activations of a pass over `rows`, [n, width] per site on the CPU; None unless every site has them."""
        name = _pass_name(rows)
        activations: dict[Site, Tensor] = {}
        for site, group in self._groups.items():
            tensor = _read(group / name, self._dtype)
            if tensor is None:
                self.misses += 1
                return None
            activations[site] = tensor
        self.hits += 1
        return activations

    def put(self, rows: Sequence[Sequence[int]], activations: dict[Site, Tensor]) -> dict[Site, Tensor]:
        """Stores the activations of a pass if there is room. Returns them in the stored dtype, as `get` would.

        Raises:
            ValueError: a value is too large for float16.
        """
        stored = {}
        for site, tensor in activations.items():
            stored[site] = tensor.to(self._dtype)
            if self._dtype == torch.float16 and not stored[site].isfinite().all() and tensor.isfinite().all():
                raise ValueError(
                    f"activations at {site} reach {float(tensor.abs().max()):.0f}, more than float16 holds (65504); "
                    "set cache_dtype to bfloat16 or float32"
                )
        if not self._full:
            name = _pass_name(rows)
            try:
                for site, tensor in stored.items():
                    self._write(self._groups[site] / name, tensor)
            except OSError as error:
                self._full = True
                warnings.warn(
                    f"the activation cache {self._folder} cannot be written ({error}); training goes on without adding "
                    "to it",
                    stacklevel=2,
                )
        return stored

    def _write(self, path: Path, tensor: Tensor) -> None:
        content = save({"activations": tensor.detach().cpu().contiguous()})
        size = _HEADER.size + len(content)
        if not self._make_room(size):
            return
        # Not an atomic_file: other runs may write the same pass, and the checksum stands in for a flush to disk.
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(_HEADER.pack(_MAGIC, zlib.crc32(content), len(content)))
                file.write(content)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._bytes += size
        self._written += 1

    def _make_room(self, size: int) -> bool:
        """Whether `size` more bytes are within the bound, after dropping other groups where that helps."""
        if self._written and self._written % _RECOUNT_WRITES == 0:
            self._bytes = self._count()
        if self._bytes + size <= self._max_bytes:
            return True
        self._bytes = self._count()
        mine = {group.name for group in self._groups.values()}
        for other in sorted(list_groups(self._folder), key=lambda group: group.used):
            if self._bytes + size <= self._max_bytes:
                break
            if other.name not in mine:
                shutil.rmtree(self._folder / other.name, ignore_errors=True)
                self._bytes = self._count()
        self._full = self._bytes + size > self._max_bytes
        return not self._full

    def _count(self) -> int:
        """Bytes in the folder; removes what killed runs left half written."""
        total = 0
        for path in self._folder.glob("*/*"):
            with suppress(FileNotFoundError):  # another run may remove it meanwhile
                state = path.stat()
                if path.suffix == ".tmp" and time.time() - state.st_mtime > _ABANDONED_S:
                    path.unlink()
                else:
                    total += state.st_size
        return total


def list_groups(folder: Path) -> list[CacheGroup]:
    """The groups of a cache folder, by name; empty if there is no such folder."""
    groups = []
    for path in sorted(folder.glob("*/group.json")):
        with suppress(OSError, ValueError):
            sizes = [file.stat().st_size for file in path.parent.iterdir()]
            used = (path.parent / "used").stat().st_mtime
            passes = sum(1 for file in path.parent.iterdir() if file.suffix == ".pass")
            groups.append(CacheGroup(path.parent.name, json.loads(path.read_text()), sum(sizes), passes, used))
    return groups


def clear_cache(folder: Path, names: Sequence[str] | None = None) -> list[CacheGroup]:
    """Removes groups of a cache folder, all or those named, and nothing else; returns them. Runs may be using them.

    Raises:
        ValueError: there is no group of a name.
    """
    groups = list_groups(folder)
    unknown = set(names or ()) - {group.name for group in groups}
    if unknown:
        raise ValueError(f"{folder} has no group {sorted(unknown)[0]!r}")
    chosen = [group for group in groups if names is None or group.name in names]
    for group in chosen:
        shutil.rmtree(folder / group.name)
    with suppress(OSError):  # it holds something else, or is not there
        folder.rmdir()
    return chosen


def _pass_name(rows: Sequence[Sequence[int]]) -> str:
    """The hash of the rows' lengths and tokens."""
    lengths = np.array([len(row) for row in rows], dtype="<i8")
    tokens = np.array([token for row in rows for token in row], dtype="<i8")
    return hashlib.sha256(lengths.tobytes() + tokens.tobytes()).hexdigest()[:40] + ".pass"


def _read(path: Path, dtype: torch.dtype) -> Tensor | None:
    """The tensor of an entry; None, and the file removed, if it is not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body = memoryview(content)[_HEADER.size :]
    if len(content) >= _HEADER.size:
        magic, checksum, length = _HEADER.unpack_from(content)
        if magic == _MAGIC and length == len(body) and checksum == zlib.crc32(body):
            tensor = load(bytes(body))["activations"]
            if tensor.dtype == dtype:
                return tensor
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return None
