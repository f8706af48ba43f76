"""One training run in one process, from text to published dictionaries."""

from __future__ import annotations

import time
from typing import Any

import torch

from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.run_rows import held_out_rows
from sae_runtime.training.activations.source import open_activation_source
from sae_runtime.training.checkpoint import (
    check_identity,
    load_checkpoint,
    run_identity,
    save_checkpoint,
)
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.initialisation import MEDIAN_SAMPLES
from sae_runtime.training.progress import ProgressCallback, ProgressMeter, figures_by_site, mean_metrics
from sae_runtime.training.publication import TrainingResult, measure_statistics, publish
from sae_runtime.training.run_log import RunLog
from sae_runtime.training.stop_signals import StopSignals, TrainingStopped
from sae_runtime.training.trainers import StepMetrics, Trainer, new_trainer, restored_trainer

__all__ = ["TrainingResult", "TrainingStopped", "held_out_rows", "measure_statistics", "publish", "run_training"]

PROGRESS_INTERVAL = 0.5
"""Least seconds between two progress events of a stage."""


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
        meter = ProgressMeter(progress, PROGRESS_INTERVAL)
        results = publish(config, _train(config, meter), meter)
        config.checkpoint_path.unlink(missing_ok=True)
        return results
    finally:
        torch.set_num_threads(previous_threads)


def check_paths(config: TrainingConfig) -> None:
    """What would be annoying to learn after training.

    Raises:
        FileExistsError: `config.out` exists.
        FileNotFoundError: a data file does not exist.
    """
    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; remove it or choose another `out`")
    for path in (*config.data, *config.held_out):
        if not path.exists():
            raise FileNotFoundError(f"no text file at {path}")


def _train(config: TrainingConfig, meter: ProgressMeter) -> dict[Site, dict[str, Any]]:
    """Trains to the last step; what the trainers export."""
    meter.begin("prepare", config.buffer_tokens)
    backbone = Backbone.load(config.backbone, dtype=config.backbone_dtype, device=config.reading_device)
    run = _Run(config, backbone)
    try:
        run.train(meter)
        return {site: trainer.export() for site, trainer in run.trainers.items()}
    finally:
        run.source.close()


class _Run:
    """Everything that a checkpoint holds, and the loop over it."""

    def __init__(self, config: TrainingConfig, backbone: Backbone) -> None:
        self.config = config
        self.sites = [backbone.check_site(site) for site in config.all_sites]
        self.identity = run_identity(config, backbone)
        # A checkpoint that does not fit is refused before any text is read.
        path = config.checkpoint_path
        saved = load_checkpoint(path) if path.exists() else None
        if saved is not None:
            check_identity(saved.get("identity", {}), self.identity, path)
        self.source = open_activation_source(config, backbone, self.sites)
        self.trainers: dict[Site, Trainer]
        if saved is not None:
            self.source.load_state_dict(saved["source"])
            self.trainers = {site: restored_trainer(config, saved["trainers"][str(site)]) for site in self.sites}
        else:
            sample = self.source.peek(min(MEDIAN_SAMPLES, config.buffer_tokens))
            self.trainers = {site: new_trainer(config, backbone.site_width(site), sample[site]) for site in self.sites}
        self.between_steps = True
        """Whether all that a checkpoint holds is of the same step."""

    @property
    def step_count(self) -> int:
        return next(iter(self.trainers.values())).step_count

    def train(self, meter: ProgressMeter) -> None:
        """Trains to the last step, with checkpoints on the way and at the end."""
        config, saved_at = self.config, time.monotonic()
        meter.begin("train", config.n_steps * config.batch_tokens, done=self.step_count * config.batch_tokens)
        with StopSignals() as stop, RunLog.open(config, self.step_count) as log:
            try:
                while self.step_count < config.n_steps and stop.received is None:
                    metrics = self._step()
                    meter.advance(config.batch_tokens, mean_metrics(list(metrics.values())))
                    if self.step_count % config.log_interval == 0:
                        log.log(self.step_count, self.step_count * config.batch_tokens, figures_by_site(metrics))
                    if config.checkpoint_interval and time.monotonic() - saved_at >= config.checkpoint_interval:
                        self.save()
                        saved_at = time.monotonic()
            except KeyboardInterrupt:
                if config.checkpoint_interval and self.between_steps:
                    self.save()
                raise
            if config.checkpoint_interval:
                self.save()  # also at the end: evaluation or publication may still fail
            if stop.received is not None and self.step_count < config.n_steps:
                raise TrainingStopped(stop.received)

    def save(self) -> None:
        state = {
            "identity": self.identity,
            "source": self.source.state_dict(),
            "trainers": {str(site): trainer.state_dict() for site, trainer in self.trainers.items()},
        }
        save_checkpoint(state, self.config.checkpoint_path)

    def _step(self) -> dict[Site, StepMetrics]:
        self.between_steps = False
        batch = self.source.next_batch(self.config.batch_tokens)
        try:
            metrics = {site: trainer.step(batch[site]) for site, trainer in self.trainers.items()}
        except FloatingPointError as error:
            path = self.config.checkpoint_path
            kept = f"; the last checkpoint is {path}" if path.exists() else ""
            raise FloatingPointError(f"{error}{kept}") from error
        self.between_steps = True
        return metrics
