"""Which k latents each token uses: the one dense product of a training step, and a fast exact selection on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24
"""Pre-activations that exist at once."""

GROUP = 32
"""Neighbouring latents whose maximum is looked at before themselves, on the CPU."""

_ORDERED_AS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""Integers of the same bits: ordered like the floats where these are positive, and below them where negative."""


def pre_activation_tiles(
    centred: Tensor, weight: Tensor, latent_bias: Tensor, *, tile_elements: int = TILE_ELEMENTS
) -> Iterator[tuple[int, Tensor]]:
    """(first token, pre-activations (tile, n)) of centred (B, d) @ weight.T + latent_bias, some tokens at a time.

    The tensor given out is overwritten by the next one.
    """
    tile = max(1, tile_elements // len(weight))
    # One memory for all tiles: fresh pages cost a quarter of the product's time.
    memory = torch.empty(min(tile, len(centred)), len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, len(centred), tile):
        rows = centred[start : start + tile]
        yield start, torch.addmm(latent_bias, rows, weight.T, out=memory[: len(rows)])


@torch.no_grad()
def choose_latents(
    centred: Tensor, weight: Tensor, latent_bias: Tensor, k: int, *, tile_elements: int = TILE_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Values float32 and indices int64, both (B, k), of each token's k largest pre-activations, in no set order.

    centred (B, d), weight (n, d), latent_bias (n,) share a dtype, in which the pre-activations are computed. Tokens are
    taken in tiles, so that at most `tile_elements` pre-activations exist at once. Among negative pre-activations, which
    ReLU sets to zero anyway, the choice is arbitrary.
    """
    values = torch.empty(len(centred), k, device=centred.device)
    indices = torch.empty(len(centred), k, dtype=torch.int64, device=centred.device)
    for start, tile in pre_activation_tiles(centred, weight, latent_bias, tile_elements=tile_elements):
        rows = slice(start, start + len(tile))
        indices[rows] = top_indices(tile, k)
        values[rows] = tile.gather(1, indices[rows]).float()
    return values, indices


def top_indices(pre_activations: Tensor, k: int) -> Tensor:
    """Indices int64 (B, k) of the k largest of each row of (B, n), by the faster of two ways."""
    n = pre_activations.shape[1]
    if pre_activations.device.type != "cpu" or n % GROUP or n < 4 * GROUP * k:
        return torch.topk(pre_activations, k, dim=1, sorted=False).indices
    return _top_indices_by_groups(pre_activations, k)


def _top_indices_by_groups(pre_activations: Tensor, k: int) -> Tensor:
    """The k-th largest group maximum bounds the k-th largest value from below: few values are left to compare.

    torch.topk is slower because it treats all values alike.
    """
    n_rows, n = pre_activations.shape
    ordered = pre_activations.view(_ORDERED_AS[pre_activations.dtype])
    maxima = ordered.view(n_rows, -1, GROUP).amax(2)
    n_groups = maxima.shape[1]
    bound = torch.from_numpy(np.partition(maxima.numpy(), n_groups - k, axis=1)[:, n_groups - k, None])
    flat = _flat_indices(ordered, maxima >= bound, bound)  # row by row; at least k in each
    rows, columns = np.divmod(flat, n)
    starts = np.searchsorted(rows, np.arange(n_rows + 1))
    values = ordered.numpy().reshape(-1)[flat]

    most = int(np.diff(starts).max())
    candidates = np.full((n_rows, most), np.iinfo(values.dtype).min, values.dtype)
    candidates[rows, np.arange(len(flat)) - starts[rows]] = values
    kth = np.partition(candidates, most - k, axis=1)[:, most - k]
    # Above the k-th value all are kept; of those equal to it the first ones, until there are k.
    above, equal = values > kth[rows], values == kth[rows]
    wanted = k - np.add.reduceat(above, starts[:-1], dtype=np.int64)
    before = np.cumsum(equal) - equal
    keep = above | (equal & (before - before[starts[:-1]][rows] < wanted[rows]))
    return torch.from_numpy(columns[keep].reshape(n_rows, k))


def indices_above(pre_activations: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns (int64, row by row) of the values of (B, n) that exceed `level`, scalar or (n,), at least 0.

    `level` float32 is compared as such, not rounded to a half-precision type of the values.
    """
    n_rows, n = pre_activations.shape
    dtype = pre_activations.dtype
    below = level.to(dtype)  # the largest value of the dtype that is not above the level
    below = torch.where(below.float() > level, below.nextafter(torch.zeros_like(below)), below)
    if pre_activations.device.type != "cpu" or n % GROUP:
        rows, columns = torch.nonzero(pre_activations > below, as_tuple=True)
        return rows, columns
    bound = below.view(_ORDERED_AS[dtype]) + 1  # the next larger value: what is at least that exceeds the level
    ordered = pre_activations.view(_ORDERED_AS[dtype])
    of_groups = bound.view(-1, GROUP).amin(1) if bound.ndim else bound
    flat = _flat_indices(ordered, ordered.view(n_rows, -1, GROUP).amax(2) >= of_groups, bound)
    rows, columns = (torch.from_numpy(part) for part in np.divmod(flat, n))
    return rows, columns


def _flat_indices(ordered: Tensor, groups: Tensor, bound: Tensor) -> np.ndarray:
    """Where `ordered` (B, n) is at least `bound`, (B, 1) or (n,) or (), looking only into marked groups (B, groups).

    Indices into the flat (B · n), ascending.
    """
    n_groups = groups.shape[1]
    marked = torch.from_numpy(np.flatnonzero(groups.numpy()))
    members = ordered.view(-1, GROUP).index_select(0, marked)
    if bound.ndim == 2:
        bound = bound.index_select(0, marked // n_groups)
    elif bound.ndim == 1:
        bound = bound.view(-1, GROUP).index_select(0, marked % n_groups)
    found = np.flatnonzero((members >= bound).numpy())
    group, member = np.divmod(found, GROUP)
    return marked.numpy()[group] * GROUP + member
