"""How close decoder directions lie: the cosine of each latent's nearest neighbour."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.evaluation.intervals import generator
from sae_runtime.progress import ProgressMeter

_TILE_ELEMENTS = 1 << 23  # cosines that exist at once, 32 MB
_BINS = 40
CLOSE = 0.9
"""A latent with a neighbour above this cosine is almost a copy of it."""


def nearest_cosines(
    decoder: Tensor, latents: Tensor | None = None, *, progress: ProgressMeter | None = None
) -> npt.NDArray[np.float32]:
    """Largest cosine of each chosen latent's decoder row with any other row, in tiles.

    Args:
        decoder: [n_latents, d]; at least two rows.
        latents: int64 [m]; all of them if not given.

    Returns:
        float32 [m], NaN for a zero row; a zero row is no other row's neighbour.
    """
    rows = decoder.float()
    norms = torch.linalg.vector_norm(rows, dim=1)
    rows = F.normalize(rows, dim=1)
    chosen = torch.arange(len(rows), device=rows.device) if latents is None else latents.to(rows.device)
    tile = max(1, _TILE_ELEMENTS // len(rows))
    nearest = []
    for start in range(0, len(chosen), tile):
        tile_latents = chosen[start : start + tile]
        cosines = rows[tile_latents] @ rows.T  # (tile, n)
        cosines[torch.arange(len(tile_latents)), tile_latents] = -torch.inf
        cosines[:, norms == 0] = -torch.inf
        best = cosines.amax(1)
        nearest.append(torch.where((norms[tile_latents] > 0) & best.isfinite(), best, torch.nan).cpu())
        if progress is not None:
            progress.reach(start + len(tile_latents))
    return torch.cat(nearest).clamp(-1, 1).numpy()


def geometry_figures(
    decoder: Tensor, n_sampled: int, seed: int, progress: ProgressMeter | None = None
) -> dict[str, Any]:
    """Nearest-neighbour cosines of up to `n_sampled` latents, beside those of as many random directions."""
    n, d = decoder.shape
    if n < 2 or n_sampled == 0:
        return {}
    chosen = torch.from_numpy(np.sort(generator(seed, "geometry").permutation(n)[:n_sampled]))
    cosines = nearest_cosines(decoder, chosen, progress=progress)
    cosines = cosines[~np.isnan(cosines)]
    directions = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    random = nearest_cosines(directions.to(decoder.device), chosen)
    if len(cosines) == 0:
        return {"geometry_latents": 0}
    edges = np.linspace(0, 1, _BINS + 1)
    quantiles = np.quantile(cosines, [0.05, 0.5, 0.95])
    return {
        "geometry_latents": len(cosines),
        "geometry_nearest_cosine_mean": float(cosines.mean(dtype=np.float64)),
        **{f"geometry_nearest_cosine_{p}": float(q) for p, q in zip(("p05", "p50", "p95"), quantiles, strict=True)},
        "geometry_close_fraction": float((cosines > CLOSE).mean()),
        "geometry_random_nearest_cosine_mean": float(random.mean(dtype=np.float64)),
        "geometry_histogram_edges": edges.tolist(),
        "geometry_histogram_counts": np.histogram(cosines.clip(0, 1), edges)[0].tolist(),
        "geometry_random_histogram_counts": np.histogram(random.clip(0, 1), edges)[0].tolist(),
    }
