"""A sweep: one dictionary for every pair of n_latents and k, and the scaling law that their errors follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from sae_runtime.dictionary.formats.published import read_manifest
from sae_runtime.progress import ProgressCallback
from sae_runtime.training.config import PENALISED, TrainingConfig
from sae_runtime.training.run import run_training
from sae_runtime.training.scaling_fit import ScalingFit, SweepPoint, fit_scaling_law
from sae_runtime.training.sweep_plot import draw_sweep

REPORT = "sweep.json"
PLOT = "sweep.png"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found; also in `sweep.json`."""

    points: tuple[SweepPoint, ...]
    fit: ScalingFit | None
    """None where the grid is too small for one."""
    reason: str
    """Why there is no fit; empty if there is one."""


def sweep_configs(base: TrainingConfig, n_latents: Sequence[int], k: Sequence[int]) -> list[TrainingConfig]:
    """The runs of the grid: `base` with other sizes, published as <out>/n<n_latents>-k<k>.

    All share an activation cache, in <out>/activations if `base` names none, so that the backbone runs once.

    Raises:
        ValueError: an empty or repeating grid, several sites, a family without k, or sizes that do not fit.
    """
    if not n_latents or not k or len(set(n_latents)) < len(n_latents) or len(set(k)) < len(k):
        raise ValueError(f"the grid is n_latents {list(n_latents)} x k {list(k)}, expected values without repeats")
    if base.sites:
        raise ValueError("a sweep is of one site; give site, not sites")
    if base.family in PENALISED:
        raise ValueError(f"family {base.family} has no k; a sweep needs one that chooses k latents")
    cache = base.cache or base.out / "activations"
    return [
        TrainingConfig(
            **base.model_dump(exclude={"n_latents", "k", "out", "name", "cache", "checkpoint", "log"}),
            n_latents=n,
            k=own_k,
            out=base.out / f"n{n}-k{own_k}",
            name=f"{base.published_name}-n{n}-k{own_k}",
            cache=cache,
        )
        for n, own_k in product(n_latents, k)
    ]


def run_sweep(
    base: TrainingConfig,
    n_latents: Sequence[int],
    k: Sequence[int],
    *,
    begin: Callable[[int, int, TrainingConfig], ProgressCallback | None] = lambda index, total, config: None,
) -> SweepResult:
    """Trains what is missing of the grid, fits the law, and writes `sweep.json` and, with matplotlib, `sweep.png`.

    A sweep that was stopped goes on with the run that it was in. `begin` is told of every run before it starts and
    gives what shows its progress.

    Raises:
        ValueError: as `sweep_configs`, or the folder holds another sweep's runs.
        Whatever `run_training` raises.
    """
    configs = sweep_configs(base, n_latents, k)
    points = []
    for index, config in enumerate(configs):
        if not config.out.exists():
            run_training(config, begin(index, len(configs), config))
        points.append(_point(config))
    fit, reason = None, ""
    try:
        fit = fit_scaling_law(points, seed=base.seed)
    except ValueError as error:
        reason = str(error)
    result = SweepResult(tuple(points), fit, reason)
    (base.out / REPORT).write_text(json.dumps(_report(base, result), indent=1) + "\n")
    draw_sweep(result.points, result.fit, base.out / PLOT)
    return result


def _point(config: TrainingConfig) -> SweepPoint:
    manifest = read_manifest(config.out)
    provenance = config.provenance()
    free = _FREE | {name for name, value in provenance.items() if value == "auto"}  # a run records what it chose
    settings = {name: value for name, value in provenance.items() if name not in free}
    found = {name: value for name, value in manifest.provenance.config.items() if name not in free}
    if found != settings:
        wrong = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
        raise ValueError(
            f"{config.out} was trained with other settings ({', '.join(wrong)}); "
            "choose another out, or remove what should be trained anew"
        )
    return SweepPoint(manifest.n_latents, config.k, manifest.evaluation["nmse"])


_FREE = {"cache", "cache_gb", "overlap", "log_interval", "tensorboard", "wandb_project"}
"""Settings that may differ between runs of one sweep: they do not change the dictionaries."""


def _report(base: TrainingConfig, result: SweepResult) -> dict[str, Any]:
    return {
        "settings": base.provenance(),
        "points": [asdict(point) for point in result.points],
        "fit": None if result.fit is None else result.fit.to_json(),
        "no_fit_because": result.reason,
    }
