"""Whether given latents are among the k largest of their row, with as little of the encoder as tells it.

An edit needs the value of one latent of a TopK dictionary: its pre-activation if it is among the row's k largest, else
0. Most latents are not, and k larger ones are found in a small part of the encoder. Only where a latent may be kept
must all others be looked at: in bfloat16, if there is such a copy of the encoder (see screened_topk), and then in
float32 those that are too near to tell, where they decide. Decoding reads every weight for a few tokens, so that a
dictionary read in full would cost as much as the blocks that it is as large as.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.kernels.linear import FEW_ROWS, few_rows_linear
from sae_runtime.kernels.screened_topk import UNIT_ROUNDOFF, Screen, screening_error

SMALL_LATENTS = 4096
"""An encoder of up to so many latents is looked at whole."""
FIRST_TILE = 1024
"""Latents that are looked at first, for k up to 64; each tile is as large as all before it, up to the largest."""
LARGEST_TILE = 8192
SMALL_BYTES = 8 << 20
"""An encoder of up to this size is read in float32 for few rows: bounds and what they leave open take as long."""
_AT_ONCE = 8192  # exact products


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
        x: [n, d]; weight: [n_latents, d]; bias: [n_latents]; on the CPU.
        rows: int64 [P], ascending; latents: int64 [P].
        values: [P] pre-activation of each pair, positive.
        screen: of weight and bias, which must be float32 then.

    Returns:
        bool [P].
    """
    own_latents = latents.numpy()
    own_rows, inverse = _distinct(rows.numpy())
    if len(own_rows) < len(x):
        x = x[torch.from_numpy(own_rows)]
    if len(x) < FEW_ROWS.stop and weight.nbytes <= SMALL_BYTES:
        screen = None
    if screen is None:
        read_x, read_weight, read_bias = x, weight, bias
        low = high = _comparable(values)
    else:
        read_x, read_weight, read_bias = x.bfloat16(), screen.weight, screen.bias
        error = screening_error(x, read_x, screen)
        if len(error) < len(values):
            error = error[torch.from_numpy(inverse)]
        # Screened values and these bounds are rounded once more when they are stored: UNIT_ROUNDOFF each.
        low = _comparable(((values - error) * (1 - 3 * UNIT_ROUNDOFF)).clamp_min(0).bfloat16(), bits=True)
        high = _comparable(((values + error) * (1 + 3 * UNIT_ROUNDOFF)).bfloat16(), bits=True)

    open_pairs = np.arange(len(rows))
    n_larger = np.zeros(len(rows), np.int64)
    near: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # pairs and latents that this comparison cannot place
    start, tile = 0, len(weight) if len(weight) <= SMALL_LATENTS else max(FIRST_TILE, 16 * k)
    while start < len(weight) and len(open_pairs):
        end = min(start + tile, len(weight))
        asked, position = _distinct(inverse[open_pairs])
        some = read_x if len(asked) == len(read_x) else read_x[torch.from_numpy(asked)]
        pre = few_rows_linear(some, read_weight[start:end], read_bias[start:end])
        found = _comparable(pre, bits=screen is not None)
        if len(position) > len(asked):
            found = found[position]  # [open pairs, tile]
        if found.flags.f_contiguous:
            found = found.T
            flat = np.flatnonzero(found >= low[open_pairs])
            latent, pair = np.divmod(flat, len(open_pairs))
        else:
            flat = np.flatnonzero(found >= low[open_pairs, None])
            pair, latent = np.divmod(flat, end - start)
        pair, latent = open_pairs[pair], latent + start
        own = own_latents[pair]
        larger = found.reshape(-1)[flat] > high[pair]
        if screen is None:
            larger |= latent < own  # the others are equal
        elsewhere = latent != own  # a latent is not larger than itself, however it was rounded here
        n_larger += np.bincount(pair[larger & elsewhere], minlength=len(rows))
        if screen is not None:
            is_near = ~larger & elsewhere
            near.append((pair[is_near], latent[is_near]))
        open_pairs = open_pairs[n_larger[open_pairs] < k]
        start, tile = end, min(end, LARGEST_TILE)

    if near:
        pair, latent = (np.concatenate(parts) for parts in zip(*near, strict=True))
        decisive = n_larger + np.bincount(pair, minlength=len(rows)) >= k
        decisive &= n_larger < k
        pair, latent = pair[decisive[pair]], latent[decisive[pair]]
        n_larger += _count_exactly(x, weight, bias, inverse, own_latents, pair, latent)
    return torch.from_numpy(n_larger < k)


def _distinct(ascending: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different numbers, and which of them each entry is."""
    is_new = np.ones(len(ascending), np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=is_new[1:])
    return ascending[is_new], is_new.cumsum() - 1


def _comparable(values: Tensor, *, bits: bool = False) -> NDArray[np.floating | np.int16]:
    """Numbers that NumPy, several times faster here than torch, orders as the values.

    bits: of bfloat16, the bits. Those of positive numbers are ordered like them, and above those of negative ones.
    """
    if bits:
        values = values.view(torch.int16)
    elif values.dtype == torch.bfloat16:  # which NumPy does not have
        values = values.float()
    return values.numpy()


def _count_exactly(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: NDArray[np.int64],
    latents: NDArray[np.int64],
    pair: NDArray[np.int64],
    others: NDArray[np.int64],
) -> NDArray[np.int64]:
    """How many of the other latents, each beside a pair, are larger than the pair's own: [number of pairs]."""
    count = np.zeros(len(latents), np.int64)
    for start in range(0, len(pair), _AT_ONCE):
        p, other = pair[start : start + _AT_ONCE], others[start : start + _AT_ONCE]
        own = latents[p]
        row = x[torch.from_numpy(rows[p])]
        # By the same additions, so that equal encoder rows have equal values.
        value, own_value = (
            ((weight[torch.from_numpy(each)] * row).sum(dim=1) + bias[torch.from_numpy(each)]).numpy()
            for each in (other, own)
        )
        larger = (value > own_value) | ((value == own_value) & (other < own))
        count += np.bincount(p[larger], minlength=len(count))
    return count
