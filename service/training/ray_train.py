"""`saeserve train --workers N`: a training run on Ray Train, watched from here."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_runtime.progress import Progress, ProgressCallback
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.distributed.sharded_checkpoint import read_json, workers_folder
from sae_runtime.training.run import check_paths
from sae_runtime.training.stop_signals import StopSignals, TrainingStopped
from sae_runtime.training.worker import check_distribution
from service.local_ray import StartError
from service.training.ray_session import Distribution, TrainingFailed, ray_session
from service.training.ray_worker import FAILURE, PROGRESS, SKIPPED, STOP, run_worker

_LOOK_EVERY_S = 0.2
_STOP_WITHIN_S = 60.0
"""Time for a step and a checkpoint after a signal, before workers are killed; the last checkpoint stays."""


def train_on_ray(
    config: TrainingConfig, distribution: Distribution, show: ProgressCallback, *, verbose: bool = False
) -> list[Path]:
    """Trains on workers and publishes. Returns the folders of the dictionaries, one per site.

    Continues from the workers' checkpoint if there is one, and removes it once everything is published. On SIGINT
    and SIGTERM a checkpoint is written first.

    Raises:
        FileExistsError: `config.out` exists.
        FileNotFoundError: a data file does not exist.
        ValueError: the run cannot be split over these workers.
        StartError: Ray does not start, or lacks a package.
        TrainingFailed: the run failed, or lost workers too often.
        TrainingStopped: a signal was received.
    """
    config = with_absolute_paths(config)
    check_paths(config)
    check_distribution(config, distribution.workers, distribution.latent_shards)
    folder = workers_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PROGRESS, FAILURE, SKIPPED, STOP):
        (folder / name).unlink(missing_ok=True)
    gpus = distribution.workers if config.device.startswith("cuda") else 0
    with ray_session(distribution.workers, gpus, address=distribution.ray_address, verbose=verbose):
        run = _Run(config, distribution, folder)
        with StopSignals() as stop:
            _watch(run, folder, show, stop)
    failure = read_json(folder / FAILURE)
    if failure is not None:
        raise TrainingFailed(failure["message"])
    if stop.received is not None and not config.out.exists():
        raise TrainingStopped(stop.received)
    if run.error is not None:
        raise TrainingFailed(f"{_last_line(run.error)}; the same command goes on from the last checkpoint")
    skipped = read_json(folder / SKIPPED)
    if skipped and skipped["summary"]:
        warnings.warn(skipped["summary"], stacklevel=2)
    shutil.rmtree(folder, ignore_errors=True)
    return [config.out_of(site) for site in config.all_sites]


def with_absolute_paths(config: TrainingConfig) -> TrainingConfig:
    """The same settings with absolute paths, for processes that may run in another folder."""
    update: dict[str, Any] = {
        name: tuple(Path(path).absolute() for path in value) if isinstance(value, tuple) else value.absolute()
        for name, value in config
        if isinstance(value, Path) or (isinstance(value, tuple) and value and isinstance(value[0], Path))
    }
    if Path(config.backbone).is_dir():
        update["backbone"] = str(Path(config.backbone).absolute())
    return config.model_copy(update=update)


class _Run(threading.Thread):
    """Ray Train's blocking `fit` in a thread, while the main thread shows progress and handles Ctrl-C."""

    def __init__(self, config: TrainingConfig, distribution: Distribution, folder: Path) -> None:
        super().__init__(daemon=True)
        self.error: Exception | None = None
        self._trainer = _trainer(config, distribution, folder)
        self.start()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:
            self.error = error


def _trainer(config: TrainingConfig, distribution: Distribution, folder: Path) -> Any:
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise StartError(f"Ray Train lacks a package ({error}): pip install 'saeserve[train]'") from error
    on_gpu = config.device.startswith("cuda")
    return TorchTrainer(
        run_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "latent_shards": distribution.latent_shards},
        # Small tensors are exchanged on the CPU even with GPUs.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=distribution.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=distribution.max_restarts),
        ),
    )


def _watch(run: _Run, folder: Path, show: ProgressCallback, stop: StopSignals) -> None:
    """Shows progress until the run ends, or until the time to stop after a signal is over."""
    lines = _new_lines(folder / PROGRESS)
    ended, deadline = False, math.inf
    while not ended and time.monotonic() < deadline:
        run.join(_LOOK_EVERY_S)
        ended = not run.is_alive()
        for line in next(lines):
            show(Progress(**json.loads(line)))
        if stop.received is not None and deadline == math.inf:
            (folder / STOP).touch()
            deadline = time.monotonic() + _STOP_WITHIN_S


def _new_lines(path: Path) -> Iterator[list[str]]:
    """Yields, at every `next`, the complete lines added to a file since the last."""
    position, rest = 0, ""
    while True:
        if path.exists():
            with path.open(encoding="utf-8") as file:
                file.seek(position)
                text = rest + file.read()
                position = file.tell()
            *lines, rest = text.split("\n")
            yield lines
        else:
            yield []


def _last_line(error: Exception) -> str:
    """The last line of a Ray error, which says what happened. The lines above are traces of many processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
