"""What of a run's settings decides the weights: for the manifest, for a run that goes on, for the runs of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_runtime.model.backbone import Backbone
from sae_runtime.training.config import TrainingConfig

ONLY_HOW = frozenset(
    {
        "out",
        "name",
        "checkpoint",
        "checkpoint_interval",
        "threads",
        "overlap",
        "cache",
        "cache_gb",
        "log",
        "log_interval",
        "tensorboard",
        "wandb_project",
    }
)
"""Settings of where things lie, how fast a run is and what it reports: of no account to the weights."""

FREE_ON_RESUME = ONLY_HOW | {"micro_batch_tokens", "storage_dtype", "evaluation_tokens", "statistics_tokens"}
"""Settings that may differ between a run and its continuation: they do not change the weights, but by rounding."""


def recorded_settings(config: TrainingConfig) -> dict[str, Any]:
    """What a manifest records: every setting that decides the dictionary, files by their names only."""
    settings = config.model_dump(mode="json", exclude=set(ONLY_HOW))
    return settings | {"data": [p.name for p in config.data], "held_out": [p.name for p in config.held_out]}


def run_identity(config: TrainingConfig, backbone: Backbone) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint, as JSON values."""
    settings = config.model_dump(mode="json", exclude=set(FREE_ON_RESUME))
    return {"settings": settings, "backbone": backbone.fingerprint}


def check_identity(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Makes sure that a checkpoint belongs to this run.

    Raises:
        ValueError: it does not; names the backbones' fingerprints, or the first settings that differ.
    """
    if found == expected:
        return
    if found.get("backbone") != expected["backbone"]:
        difference = f"its backbone has fingerprint {found.get('backbone')}, this one {expected['backbone']}"
    else:
        theirs, ours = found.get("settings", {}), expected["settings"]
        names = [name for name in ours if name not in theirs or theirs[name] != ours[name]]
        shown = (f"{name} was {theirs.get(name)!r}, is {ours[name]!r}" for name in names[:3])
        difference = ", ".join(shown) or "unknown settings"
    raise ValueError(
        f"{path} belongs to another run: {difference}; restore the settings, or remove the checkpoint to start anew"
    )
