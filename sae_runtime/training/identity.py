"""The settings that decide the weights of a run: for the manifest, for resumed runs and for sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_runtime.data.text_files import unicode_name
from sae_runtime.model.backbone import Backbone
from sae_runtime.training.config import TrainingConfig

ONLY_HOW = frozenset(
    {
        "out",
        "name",
        "bad_documents",  # a run that ends has the same weights with either rule
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
"""Settings for paths, bad text, speed and reports. They do not change the weights."""

FREE_ON_RESUME = ONLY_HOW | {"micro_batch_tokens", "storage_dtype", "evaluation_tokens", "statistics_tokens"}
"""Settings that may differ between a run and its continuation. They change the weights by rounding at most."""


def recorded_settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings that a manifest records: all that decide the dictionary, with paths cut to file names."""
    settings = config.model_dump(mode="json", exclude=set(ONLY_HOW))
    return settings | {name: [unicode_name(path) for path in getattr(config, name)] for name in ("data", "held_out")}


def run_identity(config: TrainingConfig, backbone: Backbone) -> dict[str, Any]:
    """The JSON values that must equal those of a checkpoint for a run to continue from it."""
    settings = config.model_dump(mode="json", exclude=set(FREE_ON_RESUME))
    return {"settings": settings, "backbone": backbone.fingerprint}


def check_identity(saved: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Checks that a checkpoint belongs to this run.

    Raises:
        ValueError: it does not; names the backbones' fingerprints, or the first settings that differ.
    """
    if saved == expected:
        return
    if saved.get("backbone") != expected["backbone"]:
        difference = f"its backbone has fingerprint {saved.get('backbone')}, this one {expected['backbone']}"
    else:
        theirs, ours = saved.get("settings", {}), expected["settings"]
        names = [name for name in ours if name not in theirs or theirs[name] != ours[name]]
        shown = (f"{name} was {theirs.get(name)!r}, is {ours[name]!r}" for name in names[:3])
        difference = ", ".join(shown) or "unknown settings"
    raise ValueError(
        f"{path} belongs to another run: {difference}; restore the settings, or remove the checkpoint to start anew"
    )
