"""One process of a training run, alone or among many: reads, trains, writes checkpoints, hands over its result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.kernels.products import default_compute_dtype
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.progress import ProgressMeter
from sae_runtime.training.activations.source import open_activation_source
from sae_runtime.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sae_runtime.training.communicator import SINGLE, Communicator
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.distributed.sharded_checkpoint import workers_folder
from sae_runtime.training.distributed.sharded_topk_trainer import ShardedTopKTrainer, whole_export
from sae_runtime.training.identity import check_identity, run_identity
from sae_runtime.training.initialisation import MEDIAN_SAMPLES
from sae_runtime.training.run_log import RunLog
from sae_runtime.training.trainers import StepMetrics, Trainer, new_trainer, restored_trainer

_DTYPES = (torch.float32, torch.bfloat16)
_GO_ON, _SAVE, _STOP = 0, 1, 2


def check_distribution(config: TrainingConfig, workers: int, latent_shards: int) -> None:
    """Checks that a run can be split over `workers` and `latent_shards`.

    Raises:
        ValueError: it cannot; names the setting and the expected value.
    """
    if latent_shards < 1 or workers < 1 or workers % latent_shards:
        raise ValueError(f"{workers} workers with {latent_shards} latent shards: expected a multiple of the shards")
    if latent_shards > 1 and config.family != "topk":
        raise ValueError(f"latent shards are for the family topk, found {config.family}; use latent_shards = 1")
    if config.n_streams % workers:
        raise ValueError(
            f"batch_tokens = {config.batch_tokens} is read in {config.n_streams} data streams, which {workers} workers "
            "cannot share equally; set data_lanes to a multiple of the workers that divides batch_tokens"
        )
    if config.n_latents is not None and config.n_latents % latent_shards:
        raise ValueError(f"{config.n_latents} latents cannot be split into {latent_shards} equal shards")


class Worker:
    """One worker's part of a run, from the last checkpoint on if there is one. A run in one process has one worker."""

    def __init__(
        self,
        config: TrainingConfig,
        checkpoint: Checkpoint,
        communicator: Communicator = SINGLE,
        bad: BadDocuments | None = None,
    ) -> None:
        """All workers do this together.

        Raises:
            ValueError: the data, a site or the checkpoint does not fit.
        """
        check_distribution(config, communicator.data_parallel_size * communicator.n_shards, communicator.n_shards)
        self._checkpoint = checkpoint
        self._communicator = communicator
        self.is_first = communicator.data_rank == 0 and communicator.shard_rank == 0
        before = checkpoint.identity()
        self.config = config = self._with_dtypes(config, {} if before is None else before.get("settings", {}))
        """The settings as recorded: every `auto` that affects the weights is replaced."""
        backbone = Backbone.load(config.backbone, dtype=config.backbone_dtype, device=config.reading_device)
        self.sites = [backbone.check_site(site) for site in config.all_sites]
        self._identity = run_identity(config, backbone)
        # A checkpoint that does not fit is refused before any text is read.
        if before is not None:
            check_identity(before, self._identity, checkpoint.path)
        self._source = open_activation_source(config, backbone, self.sites, communicator, bad)
        self.trainers: dict[Site, Trainer]
        if before is None:
            self.trainers = self._new_trainers(backbone)
        else:
            states, position = checkpoint.load()
            self._source.load_state_dict(position)
            self.trainers = {site: self._restored(states[str(site)]) for site in self.sites}
        self._between_steps = True  # whether trainers and source are at the same step

    @property
    def step_count(self) -> int:
        return next(iter(self.trainers.values())).step_count

    def train(self, meter: ProgressMeter, stop_requested: Callable[[], bool] = lambda: False) -> bool:
        """Trains to the last step; False if it was stopped before. Ends with a checkpoint if it writes any.

        Args:
            meter: advanced after every step; give the first worker one that shows progress.
            stop_requested: called on the first worker before each step.

        Raises:
            FloatingPointError: the loss is not finite, on every worker.
            ValueError: a document cannot be read.
            OSError: a checkpoint could not be written, on every worker.
        """
        config = self.config
        saved_at, saved_step = time.monotonic(), self.step_count
        meter.begin("train", config.n_steps * config.batch_tokens, done=self.step_count * config.batch_tokens)
        log = RunLog.open(config, self.step_count) if self.is_first else RunLog([])
        with log:
            while self.step_count < config.n_steps:
                waited = time.monotonic() - saved_at
                due = 0 < config.checkpoint_interval <= waited and self.step_count > saved_step
                decision = self._decide(_STOP if stop_requested() else _SAVE if due else _GO_ON)
                if decision == _STOP:
                    break
                if decision == _SAVE:
                    self.save()
                    saved_at, saved_step = time.monotonic(), self.step_count
                metrics = self._step()
                meter.advance(config.batch_tokens, _mean_figures(metrics))
                if self.step_count % config.log_interval == 0:
                    log.log(self.step_count, self.step_count * config.batch_tokens, _figures_by_site(metrics))
        if config.checkpoint_interval:
            self.save()  # also at the end: evaluation or publication may still fail
        return self.step_count >= config.n_steps

    def save(self) -> None:
        """Writes a checkpoint, together with all workers; does nothing in the middle of a step."""
        if self._between_steps:
            trainers = {str(site): trainer.state_dict() for site, trainer in self.trainers.items()}
            self._checkpoint.save(self._identity, self.step_count, trainers, self._source.state_dict())

    def exports(self) -> dict[Site, dict[str, Any]]:
        """`Trainer.export` of every whole dictionary on the first worker; empty on the others.

        All workers call this together. The shards go through files, one after the other: only the first worker holds
        the whole, on the CPU.
        """
        shards = self._communicator.n_shards
        if self._communicator.data_rank == 0 and shards > 1:
            for site, trainer in self.trainers.items():
                save_checkpoint(trainer.export(), self._export_file(site, self._communicator.shard_rank))
        self._communicator.gather_over_shards(torch.zeros(1))  # all files are written
        if not self.is_first:
            return {}
        if shards == 1:
            return {site: trainer.export() for site, trainer in self.trainers.items()}
        return {
            site: whole_export([load_checkpoint(self._export_file(site, shard)) for shard in range(shards)])
            for site in self.sites
        }

    def close(self) -> None:
        self._source.close()

    def _step(self) -> dict[Site, StepMetrics]:
        self._between_steps = False
        try:
            batch = self._source.next_batch(self.config.batch_tokens // self._communicator.data_parallel_size)
            metrics = {site: trainer.step(batch[site]) for site, trainer in self.trainers.items()}
        except (FloatingPointError, ValueError) as error:
            kind = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
            kept = f"; the last checkpoint is {self._checkpoint.path}" if self._checkpoint.exists() else ""
            raise kind(f"{error}{kept}") from error
        self._between_steps = True
        return metrics

    def _with_dtypes(self, config: TrainingConfig, before: Mapping[str, Any]) -> TrainingConfig:
        """Replaces an `auto` dtype by the one the run began with, or else by the fast one on the device of worker 0.

        Results differ by the rounding of a dtype, so all workers and every continuation of a run use the same.
        """
        chosen: dict[str, str] = {}
        for name, device in (("compute_dtype", config.device), ("backbone_dtype", config.reading_device)):
            if getattr(config, name) != "auto":
                continue
            fast = _DTYPES.index(default_compute_dtype(device))
            here = str(_DTYPES[int(self._communicator.broadcast(torch.tensor([fast])))]).removeprefix("torch.")
            chosen[name] = before.get(name, here)
            if chosen[name] != here and self.is_first:
                warnings.warn(
                    f"the run goes on with {name} {chosen[name]}, as it began; this machine is faster in {here}",
                    stacklevel=2,
                )
        return config.model_copy(update=chosen)

    def _export_file(self, site: Site, shard: int) -> Path:
        return workers_folder(self.config) / f"export-{site}-{shard}.pt"

    def _new_trainers(self, backbone: Backbone) -> dict[Site, Trainer]:
        config, communicator = self.config, self._communicator
        size = min(MEDIAN_SAMPLES, config.buffer_tokens)
        samples = self._source.peek(size // communicator.data_parallel_size)
        trainers: dict[Site, Trainer] = {}
        for site in self.sites:
            sample = communicator.gather_over_data(samples[site]).flatten(0, 1)  # in the order of a single process
            width = backbone.site_width(site)
            if communicator.n_shards > 1:
                trainers[site] = ShardedTopKTrainer(config, width, sample, communicator)
            else:
                trainers[site] = new_trainer(config, width, sample, communicator)
        return trainers

    def _restored(self, state: dict[str, Any]) -> Trainer:
        if self._communicator.n_shards > 1:
            return ShardedTopKTrainer.from_state(self.config, state, self._communicator)
        return restored_trainer(self.config, state, self._communicator)

    def _decide(self, wish: int) -> int:
        """The wish of the first worker."""
        return int(self._communicator.broadcast(torch.tensor([wish])))


def _mean_figures(metrics: Mapping[Site, StepMetrics]) -> dict[str, float]:
    """The mean of each figure over the sites of a run."""
    return {field.name: fmean(getattr(m, field.name) for m in metrics.values()) for field in fields(StepMetrics)}


def _figures_by_site(metrics: Mapping[Site, StepMetrics]) -> dict[str, float]:
    """Figures of a step for the run's log: by their names, after "<site>/" where there are several sites."""
    return {
        name if len(metrics) == 1 else f"{site}/{name}": value
        for site, of_site in metrics.items()
        for name, value in vars(of_site).items()
    }
