"""How a training run is spread over workers, and how it can fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Distribution:
    """How a run is spread over workers."""

    workers: int
    """Processes, each with a device of its own on GPUs."""
    latent_shards: int = 1
    """Parts that the latents are split into; workers / latent_shards replicas share each batch."""
    max_restarts: int = 3
    """How often lost workers are replaced before the run fails."""
    ray_address: str | None = None
    """A running Ray cluster, which must see the same files; None: a Ray instance of the run's own."""


class TrainingFailed(Exception):
    """The run ended without a dictionary; the message says why. Its last checkpoint is kept."""
