"""The picture of a sweep: error against the number of latents, a line for every k, with the fitted law."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sae_runtime.training.scaling_fit import ScalingFit, SweepPoint


def draw_sweep(points: Sequence[SweepPoint], fit: ScalingFit | None, path: Path) -> bool:
    """Writes a PNG; False, and nothing is written, where matplotlib (the extra `evaluate`) is absent."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    k_values = sorted({point.k for point in points})
    colors = colormaps["viridis"](np.linspace(0.1, 0.85, len(k_values)))
    for k, color in zip(k_values, colors, strict=True):
        own = sorted((p.n_latents, p.loss) for p in points if p.k == k)
        axes.plot(*zip(*own, strict=True), "o" if fit else "o-", color=color, label=f"k = {k}")
        if fit is not None:
            n = np.geomspace(own[0][0], own[-1][0], 50)
            axes.plot(n, [fit.loss(round(each), k) for each in n], "-", color=color, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="latents n", ylabel="held-out NMSE")
    axes.set_title("Points: runs. Lines: fitted L(n, k)." if fit else "Runs of the sweep", fontsize=10)
    axes.set_xticks(ticks := sorted({p.n_latents for p in points}), [f"{n:,}" for n in ticks])
    lowest, highest = min(p.loss for p in points), max(p.loss for p in points)
    losses = sorted({float(f"{each:.2g}") for each in np.geomspace(lowest, highest, 6)})  # powers of ten are too few
    axes.set_yticks(losses, [f"{each:g}" for each in losses])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    return True
