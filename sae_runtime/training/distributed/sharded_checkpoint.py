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
from sae_runtime.training.checkpoint import check_identity, load_checkpoint, save_checkpoint
from sae_runtime.training.communicator import Communicator

_LATEST = "latest.json"


class ShardedCheckpoint:
    """The checkpoints of one run in one folder."""

    def __init__(self, folder: Path, communicator: Communicator, identity: dict[str, Any]) -> None:
        """`identity`: `run_identity` of the run; a checkpoint of another is refused. The folder need not exist."""
        self.folder = folder
        self._communicator = communicator
        self._identity = identity
        self._rank = communicator.data_rank * communicator.n_shards + communicator.shard_rank

    def save(self, step: int, trainer: dict[str, Any], source: dict[str, Any]) -> None:
        """Writes this worker's part; a meeting of all workers. Earlier steps are removed once this one is complete.

        Raises:
            OSError: some worker could not write; the last checkpoint is as it was.
        """
        folder = self.folder / f"step-{step}"
        failure: OSError | None = None
        try:
            if self._communicator.data_rank == 0:
                save_checkpoint(trainer, folder / f"shard-{self._communicator.shard_rank}.pt")
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
            write_json({**latest, "identity": self._identity}, self.folder / _LATEST)
            for other in self.folder.glob("step-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
        self._meet(False)  # nobody begins the next one before this one is the latest

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What `save` was given last, for this worker, or None if there is no checkpoint.

        The number of replicas may have changed since; that of shards may not.

        Raises:
            ValueError: the checkpoint is of another run, or cannot be read.
        """
        latest = read_json(self.folder / _LATEST)
        if latest is None:
            return None
        check_identity(latest.get("identity", {}), self._identity, self.folder)
        if latest["latent_shards"] != self._communicator.n_shards:
            raise ValueError(
                f"{self.folder} is of {latest['latent_shards']} latent shards, this run has "
                f"{self._communicator.n_shards}; restore the number, or remove the folder to start anew"
            )
        folder = self.folder / f"step-{latest['step']}"
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
