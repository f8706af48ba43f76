"""A sweep: one dictionary for every pair of n_latents and k, and the scaling law that their errors follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sae_runtime.dictionary.formats.published import read_manifest
from sae_runtime.progress import ProgressCallback
from sae_runtime.training.config import PENALISED, TrainingConfig
from sae_runtime.training.identity import ONLY_HOW, recorded_settings
from sae_runtime.training.run import run_training
from sae_runtime.training.scaling_fit import ScalingFit, SweepPoint, fit_scaling_law

REPORT = "sweep.json"
PLOT = "sweep.png"


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep, as in `sweep.json`."""

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
            k=active,
            out=base.out / f"n{n}-k{active}",
            name=f"{base.published_name}-n{n}-k{active}",
            cache=cache,
        )
        for n, active in product(n_latents, k)
    ]


def run_sweep(
    base: TrainingConfig,
    n_latents: Sequence[int],
    k: Sequence[int],
    *,
    begin: Callable[[int, int, TrainingConfig], ProgressCallback | None] = lambda index, total, config: None,
) -> SweepResult:
    """Trains the missing runs of the grid, fits the law, and writes `sweep.json` and, with matplotlib, `sweep.png`.

    A stopped sweep continues with the run it was in. `begin(index, total, config)` is called before every run and
    returns the callback that shows its progress.

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
    _draw(result, base.out / PLOT)
    return result


def _point(config: TrainingConfig) -> SweepPoint:
    manifest = read_manifest(config.out)
    recorded = recorded_settings(config)
    free = ONLY_HOW | {name for name, value in recorded.items() if value == "auto"}  # a run records what it chose
    settings = {name: value for name, value in recorded.items() if name not in free}
    trained_with = {name: value for name, value in manifest.provenance.config.items() if name not in free}
    if trained_with != settings:
        wrong = sorted(
            name for name in settings.keys() | trained_with.keys() if settings.get(name) != trained_with.get(name)
        )
        raise ValueError(
            f"{config.out} was trained with other settings ({', '.join(wrong)}); "
            "choose another out, or remove what should be trained anew"
        )
    return SweepPoint(manifest.n_latents, config.k, manifest.evaluation["nmse"])


def _report(base: TrainingConfig, result: SweepResult) -> dict[str, Any]:
    return {
        "settings": recorded_settings(base),
        "points": [asdict(point) for point in result.points],
        "fit": None if result.fit is None else result.fit.to_json(),
        "no_fit_because": result.reason,
    }


def _draw(result: SweepResult, path: Path) -> None:
    """Error against the number of latents, a line for every k, with the fitted law; nothing without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    points, fit = result.points, result.fit
    figure = Figure(figsize=(6.4, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    k_values = sorted({point.k for point in points})
    colors = colormaps["viridis"](np.linspace(0.1, 0.85, len(k_values)))
    for k, color in zip(k_values, colors, strict=True):
        line = sorted((p.n_latents, p.loss) for p in points if p.k == k)
        axes.plot(*zip(*line, strict=True), "o" if fit else "o-", color=color, label=f"k = {k}")
        if fit is not None:
            n = np.geomspace(line[0][0], line[-1][0], 50)
            axes.plot(n, [fit.loss(round(size), k) for size in n], "-", color=color, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="latents n", ylabel="held-out NMSE")
    axes.set_title("Points: runs. Lines: fitted L(n, k)." if fit else "Runs of the sweep", fontsize=10)
    axes.set_xticks(ticks := sorted({p.n_latents for p in points}), [f"{n:,}" for n in ticks])
    lowest, highest = min(p.loss for p in points), max(p.loss for p in points)
    losses = sorted({float(f"{loss:.2g}") for loss in np.geomspace(lowest, highest, 6)})  # powers of ten are too few
    axes.set_yticks(losses, [f"{loss:g}" for loss in losses])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
