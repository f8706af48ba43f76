"""Whether given latents are among the k largest of their row, without the whole encoder where that can be told sooner.

An edit needs the value of one latent of a TopK dictionary: its pre-activation if it is among the row's k largest, else
0. Most latents are not, and k larger ones are found in a small part of the encoder. Only where a latent may be kept
must all others be looked at: in bfloat16 first, if there is such a copy of the encoder (see screened_topk), and then in
float32 at those that are too near to tell. Decoding reads every weight for a few tokens, so that a dictionary read in
full would cost as much as the blocks that it is as large as.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_runtime.kernels.linear import few_rows_linear
from sae_runtime.kernels.screened_topk import UNIT_ROUNDOFF, Screen, screening_error

SMALL_BYTES = 8 << 20
"""An encoder of up to this size stays in a cache, and is read whole at once."""
FIRST_TILE = 1024
"""Latents that are looked at first, for k up to 64; each tile is as large as all before it, up to the largest."""
LARGEST_TILE = 8192


def kept_in_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    rows: Tensor,
    latents: Tensor,
    values: Tensor,
    screen: Screen | None = None,
) -> Tensor:
    """For P pairs of a row and a latent: whether the latent is among the k largest of `x @ weight.T + bias` there.

    Of equal values the one of the lower latent is the larger, as in `tiled_topk`. Where rounding decides which of two
    values is larger, the answer may differ from that of another order of additions.

    Args:
        x: [n, d]; weight: [n_latents, d]; bias: [n_latents].
        rows, latents: int64 [P].
        values: [P] pre-activation of each pair, positive.
        screen: of weight and bias, which must be float32 then.

    Returns:
        bool [P].
    """
    kept = torch.ones(len(rows), dtype=torch.bool, device=x.device)
    larger = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
    open_pairs = torch.arange(len(rows), device=x.device)
    start, tile = 0, len(weight) if weight.nbytes <= SMALL_BYTES else max(FIRST_TILE, 16 * k)
    while start < len(weight) and len(open_pairs):
        own_rows, own_latents, own_values = rows[open_pairs], latents[open_pairs], values[open_pairs]
        if start and screen is not None:
            kept[open_pairs] = _count_screened(x, weight, bias, own_rows, own_latents, own_values, screen) < k
            return kept
        end = min(start + tile, len(weight))
        asked, inverse = own_rows.unique(return_inverse=True)
        pre = few_rows_linear(x[asked], weight[start:end], bias[start:end])
        if len(asked) < len(own_rows):
            pre = pre[inverse]  # [open pairs, tile]
        larger[open_pairs] += _count(pre, start, own_latents, own_values)
        decided = larger[open_pairs] >= k
        kept[open_pairs[decided]] = False
        open_pairs = open_pairs[~decided]
        start, tile = end, min(end, LARGEST_TILE)
    return kept


def _count(pre: Tensor, start: int, latents: Tensor, values: Tensor) -> Tensor:
    """How many of the latents start, start + 1, … are larger than each pair's: pre [P, tile] -> int64 [P]."""
    end = start + pre.shape[1]
    # Of equals, a lower latent counts as larger. A latent is not larger than itself, however it was rounded here.
    inside = ((latents >= start) & (latents < end)).nonzero().squeeze(1)
    column = latents[inside] - start
    pre[inside, column] = -torch.inf
    if pre.dtype == torch.bfloat16:  # which NumPy does not have
        pre, values = pre.float(), values.float()
    found, value = pre.numpy(), values.numpy()[:, None]  # NumPy is several times faster here than torch
    count = np.count_nonzero(found > value, axis=1)
    for pair in np.flatnonzero(np.count_nonzero(found >= value, axis=1) > count):
        count[pair] += np.count_nonzero(found[pair, : max(int(latents[pair]) - start, 0)] == value[pair])
    return torch.from_numpy(count)


def _count_screened(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, latents: Tensor, values: Tensor, screen: Screen
) -> Tensor:
    """How many latents are larger than each pair's, int64 [P]."""
    own_rows, inverse = rows.unique(return_inverse=True)
    exact = x[own_rows]
    rounded = exact.bfloat16()
    screened = few_rows_linear(rounded, screen.weight, screen.bias).contiguous()  # [rows, n_latents]
    error = screening_error(exact, rounded, screen)[inverse]
    # Screened values and these bounds are rounded once more when they are stored, each by half of 2 * UNIT_ROUNDOFF.
    surely = ((values + error) * (1 + 3 * UNIT_ROUNDOFF)).bfloat16()
    maybe = ((values - error) * (1 - 3 * UNIT_ROUNDOFF)).clamp_min(0).bfloat16()
    # The bits of positive floats are ordered like them, and above those of negative ones; NumPy compares them quickly.
    bits = screened.view(torch.int16).numpy()[inverse.numpy()]  # [P, n_latents]
    high, low = surely.view(torch.int16).numpy(), maybe.view(torch.int16).numpy()
    above = bits > high[:, None]
    near = np.flatnonzero((bits >= low[:, None]) & ~above)
    pair, latent = (torch.from_numpy(part) for part in np.divmod(near, bits.shape[1]))
    count = torch.from_numpy(np.count_nonzero(above, axis=1))
    # Those that bfloat16 cannot tell from the pair's own: a few tens for each.
    for start in range(0, len(pair), LARGEST_TILE):
        p, other = pair[start : start + LARGEST_TILE], latent[start : start + LARGEST_TILE]
        value = (exact[inverse[p]] * weight[other]).sum(dim=1) + bias[other]
        own, own_value = latents[p], values[p]
        is_larger = (other != own) & ((value > own_value) | ((value == own_value) & (other < own)))
        count.index_add_(0, p, is_larger.long())
    return count
