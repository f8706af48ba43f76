"""Checkpoints of a training run: written so that a killed run always leaves the last good one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch

from sae_runtime.atomic import atomic_file


class Checkpoint(Protocol):
    """Where a run keeps its last checkpoint."""

    path: Path

    def exists(self) -> bool: ...

    def identity(self) -> dict[str, Any] | None:
        """`run_identity` of the run that the checkpoint is of; None if there is no checkpoint.

        Raises:
            ValueError: it cannot be read.
        """

    def load(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """States of the trainers by site, and of the source of activations. Asked once, after `identity`."""
        ...

    def save(self, identity: dict[str, Any], step: int, trainers: dict[str, Any], source: dict[str, Any]) -> None:
        """Replaces the checkpoint.

        Raises:
            OSError: it cannot be written; the last one is as it was.
        """


class FileCheckpoint:
    """The checkpoint of a run in one process: one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, Any] = {}

    def exists(self) -> bool:
        return self.path.exists()

    def identity(self) -> dict[str, Any] | None:
        if not self.exists():
            return None
        self._state = load_checkpoint(self.path)
        return dict(self._state.get("identity", {}))

    def load(self) -> tuple[dict[str, Any], dict[str, Any]]:
        state, self._state = self._state, {}
        return state["trainers"], state["source"]

    def save(self, identity: dict[str, Any], step: int, trainers: dict[str, Any], source: dict[str, Any]) -> None:
        save_checkpoint({"identity": identity, "source": source, "trainers": trainers}, self.path)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain values to a file that appears complete or not at all.

    Raises:
        OSError: the file cannot be written, for example as the disk is full; what was at `path` is as it was.
    """
    try:
        with atomic_file(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # PyTorch's writer turns what the file says into a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        kept = "; the last checkpoint is kept" if path.exists() else ""
        number = cause.errno if isinstance(cause, OSError) else None
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        raise OSError(number, f"the checkpoint {path} cannot be written: {reason}{kept}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; runs no code from the file.

    Raises:
        ValueError: the file is not a checkpoint.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of a training run ({error}); remove it to start anew") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds {type(state).__name__}, expected a checkpoint; remove it to start anew")
    return state
