"""Checkpoints that many workers write together: a folder in which the last complete one can always be told.

    <folder>/latest.json              which step's files are complete, and of what run they are
    <folder>/step-1200/shard-0.pt     weights, optimiser and counters of a shard, written by one replica: all are alike
    <folder>/step-1200/source-0.pt    data position of a worker

Files are flushed and renamed, and `latest.json` is replaced only after every worker has written its own, so a worker or
the whole run may be killed at any moment. The folder must be one that all workers see.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_runtime.atomic import atomic_file
from sae_runtime.training.activations.source import merge_source_states
from sae_runtime.training.checkpoint import load_checkpoint, save_checkpoint
from sae_runtime.training.communicator import Communicator
from sae_runtime.training.config import TrainingConfig

_LATEST = "latest.json"


def workers_folder(config: TrainingConfig) -> Path:
    """Where the workers of a run keep checkpoints and what they hand over; all must see it."""
    return config.checkpoint_path.with_suffix(".workers")


class ShardedCheckpoint:
    """The checkpoint of a run with many workers, in one folder."""

    def __init__(self, folder: Path, communicator: Communicator) -> None:
        """The folder need not exist."""
        self.path = folder
        self._communicator = communicator
        self._rank = communicator.data_rank * communicator.n_shards + communicator.shard_rank

    def exists(self) -> bool:
        return (self.path / _LATEST).exists()

    def save(self, identity: dict[str, Any], step: int, trainers: dict[str, Any], source: dict[str, Any]) -> None:
        """Writes this worker's part; a meeting of all workers. Earlier steps are removed once this one is complete.

        Raises:
            OSError: some worker could not write; the last checkpoint is as it was.
        """
        folder = self.path / f"step-{step}"
        failure: OSError | None = None
        try:
            if self._communicator.data_rank == 0:
                save_checkpoint(trainers, folder / f"shard-{self._communicator.shard_rank}.pt")
            save_checkpoint(source, folder / f"source-{self._rank}.pt")
        except OSError as error:
            failure = error
        failed = self._meet(failure is not None)
        if failed:
            raise OSError(
                f"the checkpoint of step {step} could not be written in {folder} by {failed} of {self._workers} workers"
                + (f": {failure}" if failure else "")
            ) from failure
        if self._rank == 0:
            latest = {"step": step, "workers": self._workers, "latent_shards": self._communicator.n_shards}
            write_json({**latest, "identity": identity}, self.path / _LATEST)
            for other in self.path.glob("step-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
        self._meet(False)  # nobody begins the next one before this one is the latest

    def identity(self) -> dict[str, Any] | None:
        latest = read_json(self.path / _LATEST)
        return None if latest is None else latest.get("identity", {})

    def load(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save` was given last, for this worker. There must be a checkpoint.

        The number of replicas may have changed since; that of shards may not.

        Raises:
            ValueError: the checkpoint cannot be read, or is of another number of shards.
        """
        latest = read_json(self.path / _LATEST)
        assert latest is not None
        if latest["latent_shards"] != self._communicator.n_shards:
            raise ValueError(
                f"{self.path} is of {latest['latent_shards']} latent shards, this run has "
                f"{self._communicator.n_shards}; restore the number, or remove the folder to start anew"
            )
        folder = self.path / f"step-{latest['step']}"
        trainer = load_checkpoint(folder / f"shard-{self._communicator.shard_rank}.pt")
        if latest["workers"] == self._workers:
            return trainer, load_checkpoint(folder / f"source-{self._rank}.pt")
        sources = [load_checkpoint(folder / f"source-{rank}.pt") for rank in range(latest["workers"])]
        return trainer, merge_source_states(sources)

    @property
    def _workers(self) -> int:
        return self._communicator.data_parallel_size * self._communicator.n_shards

    def _meet(self, flag: bool) -> int:
        """Waits for all workers; how many of them raised the flag."""
        count = self._communicator.sum_over_data(torch.tensor([float(flag)]))
        return int(self._communicator.sum_over_shards(count))


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON file that appears complete or not at all."""
    with atomic_file(path) as file:
        file.write(json.dumps(value).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file.

    Raises:
        ValueError: the file holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove {path.parent} to start anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected an object")
    return value
