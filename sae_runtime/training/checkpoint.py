"""Checkpoints of a training run: written so that a killed run always leaves the last good one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain values atomically: to a temporary file beside `path`, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; runs no code from the file.

    Raises:
        ValueError: the file is not a checkpoint.
    """
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of a training run ({error}); remove it to start anew") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds {type(state).__name__}, expected a checkpoint; remove it to start anew")
    return state
