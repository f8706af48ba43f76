"""One training run in one process, from text to published dictionaries."""

from __future__ import annotations

from typing import Any

import torch

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.model.sites import Site
from sae_runtime.progress import ProgressCallback, ProgressMeter
from sae_runtime.training.checkpoint import FileCheckpoint
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.publication import TrainingResult, publish_run
from sae_runtime.training.stop_signals import StopSignals, TrainingStopped
from sae_runtime.training.worker import Worker


def run_training(config: TrainingConfig, progress: ProgressCallback | None = None) -> tuple[TrainingResult, ...]:
    """Trains, measures and publishes the dictionaries that `config` describes, one for each site.

    Goes on from its checkpoint if there is one; that is removed once the dictionaries are published. SIGINT and SIGTERM
    end the step that is going on and write a checkpoint.

    Raises:
        FileExistsError: `config.out` exists.
        FileNotFoundError: a data file does not exist.
        OSError: something cannot be written, for example as the disk is full; the last checkpoint is kept.
        ValueError: a site, the text, or the checkpoint does not fit; says what was found and what was expected.
        FloatingPointError: the loss is not finite; the last checkpoint is kept.
        TrainingStopped: a signal came.
    """
    check_paths(config)
    previous_threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        meter = ProgressMeter(progress)
        with BadDocuments(config.bad_documents) as bad:
            results = publish_run(*_train(config, meter, bad), meter, bad)
        config.checkpoint_path.unlink(missing_ok=True)
        return results
    finally:
        torch.set_num_threads(previous_threads)


def check_paths(config: TrainingConfig) -> None:
    """Checks paths before training, so that it does not fail at the end.

    Raises:
        FileExistsError: `config.out` exists.
        FileNotFoundError: a data file does not exist.
    """
    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; remove it or choose another `out`")
    for path in (*config.data, *config.held_out):
        if not path.exists():
            raise FileNotFoundError(f"no text file at {path}")


def _train(
    config: TrainingConfig, meter: ProgressMeter, bad: BadDocuments
) -> tuple[TrainingConfig, dict[Site, dict[str, Any]]]:
    """Trains to the last step; the settings as they are recorded, and what the trainers export."""
    meter.begin("prepare", config.buffer_tokens)
    worker = Worker(config, FileCheckpoint(config.checkpoint_path), bad=bad)
    try:
        with StopSignals() as stop:
            try:
                finished = worker.train(meter, lambda: stop.received is not None)
            except KeyboardInterrupt:  # the second one, or that of a callback
                if config.checkpoint_interval:
                    worker.save()
                raise
            if not finished and stop.received is not None:
                raise TrainingStopped(stop.received)
        return worker.config, worker.exports()
    finally:
        worker.close()
