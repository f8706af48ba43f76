"""Whether given latents are among the k largest of their row, without the whole encoder where that can be told sooner.

An edit needs the value of one latent of a TopK dictionary: its pre-activation if it is among the row's k largest, else
0. Most latents are not, and k larger ones are found in a small part of the encoder; only for a latent that is kept must
all others be looked at. Decoding reads every weight for a few tokens, so that a dictionary read in full would cost as
much as the blocks that it is as large as.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_TILE = 1024
"""Latents that are looked at first, for k up to 64; each tile is as large as all before it, up to the largest."""
LARGEST_TILE = 8192


def kept_in_topk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, rows: Tensor, latents: Tensor, values: Tensor
) -> Tensor:
    """For P pairs of a row and a latent: whether the latent is among the k largest of `x @ weight.T + bias` there.

    Of equal values the one of the lower latent is the larger, as in `tiled_topk`. Where rounding decides which of two
    values is larger, the answer may differ from that of another order of additions.

    Args:
        x: [n, d]; weight: [n_latents, d]; bias: [n_latents].
        rows, latents: int64 [P].
        values: [P] pre-activation of each pair.

    Returns:
        bool [P].
    """
    kept = torch.ones(len(rows), dtype=torch.bool, device=x.device)
    larger = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
    open_pairs = torch.arange(len(rows), device=x.device)
    start, tile = 0, max(FIRST_TILE, 16 * k)
    while start < len(weight) and len(open_pairs):
        end = min(start + tile, len(weight))
        own_rows, inverse = rows[open_pairs].unique(return_inverse=True)
        pre = torch.addmm(bias[start:end], x[own_rows], weight[start:end].T)[inverse]  # [open pairs, tile]
        own, value = latents[open_pairs, None], values[open_pairs, None]
        index = torch.arange(start, end, device=x.device)
        # A latent is not larger than itself, however its value was rounded here.
        count = ((pre > value) & (index != own)).sum(dim=1) + ((pre == value) & (index < own)).sum(dim=1)
        larger[open_pairs] += count
        decided = larger[open_pairs] >= k
        kept[open_pairs[decided]] = False
        open_pairs = open_pairs[~decided]
        start, tile = end, min(end, LARGEST_TILE)
    return kept
