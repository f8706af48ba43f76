"""Reads files written by torch.save without running code that a pickle may hold."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_runtime.errors import DictionaryFormatError


def read_torch_file(path: Path, expected: str) -> Mapping[str, Any]:
    """The mapping in a file. Its tensors are on the host, memory-mapped if the file allows it.

    `expected` says in errors what kind of file should be there.

    Raises:
        DictionaryFormatError: damaged, not a mapping, or a pickle that names code, which is not run.
    """
    try:
        # Memory-mapping needs the zip container that torch has written since 1.6. Older files are read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise DictionaryFormatError(
            f"{path}: not plain tensors, so it was not loaded and no code in it was run; expected {expected}: {reason}"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError and others on damaged files
        size = path.stat().st_size if path.is_file() else "no"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DictionaryFormatError(
            f"{path}: found {size} bytes that do not read as {expected}; truncated or another format? {reason}"
        ) from error
    if not isinstance(state, Mapping):
        raise DictionaryFormatError(f"{path}: found a {type(state).__name__}, expected {expected}")
    return state
