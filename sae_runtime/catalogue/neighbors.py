"""Latents that lie near one another by the cosine of their decoder rows, and latents that fire on the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.catalogue.firings import Firings
from sae_runtime.kernels.topk import tiled_topk
from sae_runtime.progress import ProgressMeter

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

MAX_COMPANIONS = 64
LEAST_TOGETHER = 5
"""Tokens of the sample on which two latents must both fire to count as firing together."""

_ROWS_AT_ONCE = 1 << 12  # between two signs of progress
_FAR = 4.0  # taken from the cosines with a row of zeros, which then are below all others
_PAIRS_AT_ONCE = 1 << 22
_MAX_PAIRS = 1 << 28


def nearest_latents(
    decoder: Tensor, others: Tensor | None, count: int, progress: ProgressMeter | None = None
) -> tuple[Integers, npt.NDArray[np.float32]]:
    """The rows of `others` with the largest cosine to each row of `decoder`, largest first.

    Args:
        decoder: [n, d].
        others: [m, d]; None: the rows of `decoder` without the row itself.

    Returns:
        Latents int64 [n, c] and cosines float32 [n, c], c = min(count, candidates); -1 and 0 for a row of zeros. A row
        of zeros is nobody's neighbour.
    """
    rows = F.normalize(decoder.float(), dim=1)
    candidates = rows if others is None else F.normalize(others.to(decoder.device).float(), dim=1)
    itself = others is None
    count = min(count, len(candidates) - itself)
    if count < 1:
        return np.zeros((len(rows), 0), np.int64), np.zeros((len(rows), 0), np.float32)
    bias = torch.where((candidates == 0).all(1), -_FAR, 0.0)
    latents, cosines = [], []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        tile = rows[start : start + _ROWS_AT_ONCE]
        values, indices = tiled_topk(tile, candidates, bias, count + itself)
        if itself:
            # The row itself goes, or the last if it is not among them: others may have the same direction.
            is_itself = indices == torch.arange(start, start + len(tile), device=indices.device)[:, None]
            place = torch.where(is_itself.any(1), is_itself.int().argmax(1), count)
            kept = torch.arange(count, device=indices.device).expand(len(tile), -1)
            kept = kept + (kept >= place[:, None])
            values, indices = values.gather(1, kept), indices.gather(1, kept)
        missing = (values < -_FAR / 2) | (tile == 0).all(1, keepdim=True)
        latents.append(indices.masked_fill(missing, -1).cpu())
        cosines.append(values.masked_fill(missing, 0).clamp(-1, 1).cpu())
        if progress is not None:
            progress.reach(start + len(tile))
    return torch.cat(latents).numpy(), torch.cat(cosines).numpy()


def companions(nearest: Integers, cosines: Array) -> Integers:
    """Who has each latent among its nearest: int64 [n, c], -1 where there are fewer, the largest cosine first.

    A latent that is near very many keeps MAX_COMPANIONS of them.
    """
    latent = np.repeat(np.arange(len(nearest)), nearest.shape[1])
    near, cosine = nearest.ravel(), cosines.ravel()
    order = np.lexsort((-cosine, near))
    order = order[near[order] >= 0]
    rank = np.arange(len(order)) - np.searchsorted(near[order], near[order])
    order, rank = order[rank < MAX_COMPANIONS], rank[rank < MAX_COMPANIONS]
    table = np.full((len(nearest), int(rank.max(initial=-1)) + 1), -1, np.int64)
    table[near[order], rank] = latent[order]
    return table


def fires_together(firings: Firings, count: int) -> tuple[Integers, npt.NDArray[np.float32]]:
    """The latents whose firing correlates most with each latent's, by phi over the tokens of a sample.

    With n tokens, a and b on which either fires and c on which both do,

        phi = (n c - a b) / sqrt(a (n - a) b (n - b)).

    Only pairs with c >= LEAST_TOGETHER count. Where the tokens have so many pairs that it would take long, those of the
    first tokens are counted.

    Returns:
        Latents int64 [n_latents, count], -1 where there are fewer, and phi float32 [n_latents, count], largest first.
    """
    l0 = np.diff(firings.splits)
    n = int(np.searchsorted(np.square(l0).cumsum(), _MAX_PAIRS, side="right"))
    latent, token = firings.latent[: firings.splits[n]], firings.token[: firings.splits[n]]
    fired = np.bincount(latent, minlength=firings.n_latents).astype(np.float64)
    partners = np.full((firings.n_latents, count), -1, np.int64)
    phis = np.zeros((firings.n_latents, count), np.float32)
    by_latent = np.argsort(latent, kind="stable")
    pairs_until = np.append(0, l0[token[by_latent]].cumsum())  # pairs of the firings before, in this order
    starts = np.searchsorted(latent[by_latent], np.arange(firings.n_latents + 1))
    first = 0
    while first < firings.n_latents:  # as many latents at a time as have few enough pairs, but at least one
        enough = np.searchsorted(pairs_until[starts], pairs_until[starts[first]] + _PAIRS_AT_ONCE, side="right") - 1
        last = max(first + 1, int(enough))
        chosen = by_latent[starts[first] : starts[last]]
        sizes = l0[token[chosen]]
        offset = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        partner = latent[np.repeat(firings.splits[token[chosen]], sizes) + offset]
        key, both = np.unique(np.repeat(latent[chosen], sizes) * firings.n_latents + partner, return_counts=True)
        a_latent, b_latent = np.divmod(key, firings.n_latents)
        kept = (both >= LEAST_TOGETHER) & (a_latent != b_latent)
        a_latent, b_latent, both = a_latent[kept], b_latent[kept], both[kept]
        a, b = fired[a_latent], fired[b_latent]
        scale = np.sqrt(a * (n - a) * b * (n - b))
        phi = np.divide(n * both - a * b, scale, out=np.zeros(len(both)), where=scale > 0)
        order = np.lexsort((b_latent, -phi, a_latent))
        rank = np.arange(len(order)) - np.searchsorted(a_latent[order], a_latent[order])
        order, rank = order[rank < count], rank[rank < count]
        order, rank = order[phi[order] > 0], rank[phi[order] > 0]
        partners[a_latent[order], rank], phis[a_latent[order], rank] = b_latent[order], phi[order]
        first = last
    return partners, phis
