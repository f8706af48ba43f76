"""Whether given latents are among the k largest of their row, with as little of the encoder as tells it.

An edit needs the value of one latent of a TopK dictionary: its pre-activation if it is among the row's k largest, else
0. Most latents are not, and k larger ones are found in a small part of the encoder. Only where a latent may be kept
must all others be looked at: in bfloat16, if there is such a copy of the encoder (see screened_topk), and then in
float32 those that are too near to tell, where they decide. Decoding reads every weight for a few tokens, so that a
dictionary read in full would cost as much as the blocks that it is as large as.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.kernels.linear import few_rows_linear
from sae_runtime.kernels.screened_topk import UNIT_ROUNDOFF, Screen, screening_error

SMALL_LATENTS = 4096
"""An encoder of up to so many latents is looked at whole."""
FIRST_TILE = 1024
"""Latents that are looked at first, for k up to 64; each tile is as large as all before it, up to the largest."""
LARGEST_TILE = 8192
_AT_ONCE = 8192  # exact products
_MOST_HELD = 1 << 24  # pre-activations
_LANES = 128  # latents that are counted side by side, in bytes: 8 of them at each addition of 64-bit numbers

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def kept_in_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    rows: Ints,
    latents: Ints,
    values: Floats,
    screen: Screen | None = None,
) -> Bools:
    """For P pairs of a row and a latent: whether the latent is among the k largest of `x @ weight.T + bias` there.

    Of equal values the one of the lower latent is the larger, as in `tiled_topk`. Where rounding decides which of two
    values is larger, the answer may differ from that of another order of additions.

    Args:
        x: [n, d]; weight: [n_latents, d]; bias: [n_latents]; on the CPU.
        rows: [P], ascending; latents: [P].
        values: [P] pre-activation of each pair, positive.
        screen: of weight and bias, which must be float32 then.

    Returns:
        [P].
    """
    own_rows, row_of_pair = _distinct(rows)
    if len(own_rows) < len(x):
        x = x[torch.from_numpy(own_rows)]
    n_at_once = max(1, _MOST_HELD // len(weight))
    if len(x) <= n_at_once:
        return _Ranks(x, weight, bias, row_of_pair, latents, values, screen).among(k)
    kept = np.zeros(len(rows), np.bool_)
    for start in range(0, len(x), n_at_once):
        pairs = slice(*np.searchsorted(row_of_pair, (start, start + n_at_once)))
        part = x[start : start + n_at_once]
        ranks = _Ranks(part, weight, bias, row_of_pair[pairs] - start, latents[pairs], values[pairs], screen)
        kept[pairs] = ranks.among(k)
    return kept


class _Tile(NamedTuple):
    """Comparable pre-activations of a run of latents."""

    start: int  # the first latent
    rows: Ints  # ascending
    values: NDArray[Any]  # [rows, latents]


class _Ranks:
    """How many latents are larger than those of the pairs."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor, rows: Ints, latents: Ints, values: Floats, screen: Screen | None
    ) -> None:
        """Every row of x belongs to one pair at least; otherwise as for `kept_in_topk`."""
        self._x, self._weight, self._bias = x, weight, bias
        self._rows, self._latents = rows, latents
        self._screen = screen
        self._low: NDArray[Any]  # what is not smaller may be larger than the pair's own value
        self._high: NDArray[Any]  # what exceeds this is larger
        if screen is None:
            self._read = x, weight, bias
            self._low = self._high = values
            return
        self._read = x.bfloat16(), screen.weight, screen.bias
        error = screening_error(x, self._read[0], screen)
        if len(error) < len(values):
            error = error[rows]
        # Screened values and these bounds are rounded once more when they are stored: UNIT_ROUNDOFF each.
        bounds = np.stack(
            [
                np.maximum((values - error) * (1 - 3 * UNIT_ROUNDOFF), 0),
                (values + error) * (1 + 3 * UNIT_ROUNDOFF),
            ]
        )
        self._low, self._high = _comparable(torch.from_numpy(bounds).bfloat16(), bits=True)

    def among(self, k: int) -> Bools:
        """Whether fewer than k are larger, for each pair."""
        x, weight, bias = self._read
        n_above = np.zeros(len(self._rows), np.int64)  # that are surely larger, but for itself by rounding
        tiles: list[_Tile] = []
        open_pairs = np.arange(len(self._rows))
        start, size = 0, len(weight) if len(weight) <= SMALL_LATENTS else max(FIRST_TILE, 16 * k)
        while True:
            end = min(start + size, len(weight))
            asked, position = _distinct(self._rows[open_pairs])
            some = x if len(asked) == len(x) else x[torch.from_numpy(asked)]
            pre = few_rows_linear(some, weight[start:end], bias[start:end])
            found = _comparable(pre, bits=self._screen is not None)
            tiles.append(_Tile(start, asked, found))
            if end == len(weight):
                break
            n_above[open_pairs] += _count(_of_pairs(found, position) > self._high[open_pairs, None])
            open_pairs = open_pairs[n_above[open_pairs] <= k]
            if not len(open_pairs):
                break
            start, size = end, min(end, LARGEST_TILE)
        kept = np.zeros(len(self._rows), np.bool_)
        kept[open_pairs] = True
        may_be_larger = sum(self._count_in(tile, open_pairs, np.greater_equal, self._low) for tile in tiles)
        doubtful = open_pairs[may_be_larger >= k]  # the latent itself is counted as well
        if len(doubtful):
            n_above[doubtful] += self._count_in(tiles[-1], doubtful, np.greater, self._high)
            kept[doubtful] = False
            doubtful = doubtful[n_above[doubtful] <= k]
            kept[doubtful] = self._n_larger(doubtful, tiles, k) < k
        return kept

    def _count_in(self, tile: _Tile, pairs: Ints, compare: np.ufunc, bounds: NDArray[Any]) -> Ints:
        """How many values of a tile are so to the bound of each of these pairs."""
        places = np.searchsorted(tile.rows, self._rows[pairs])
        return _count(compare(_of_pairs(tile.values, places), bounds[pairs, None]))

    def _n_larger(self, pairs: Ints, tiles: Sequence[_Tile], k: int) -> Ints:
        """How many latents are larger than each pair's; exact where it is less than k, or may be."""
        n_larger = np.zeros(len(pairs), np.int64)
        near: list[tuple[Ints, Ints]] = []  # pairs, by their place, and latents that this comparison cannot order
        for tile in tiles:
            values = _of_pairs(tile.values, np.searchsorted(tile.rows, self._rows[pairs]))
            place, latent = np.nonzero(values >= self._low[pairs, None])
            is_larger = values[place, latent] > self._high[pairs[place]]
            latent += tile.start
            is_other = latent != self._latents[pairs[place]]  # however the latent itself was rounded here
            n_larger += np.bincount(place[is_larger & is_other], minlength=len(pairs))
            is_near = ~is_larger & is_other
            near.append((place[is_near], latent[is_near]))
        place, others = (np.concatenate(parts) for parts in zip(*near, strict=True))
        decisive = (n_larger < k)[place]
        place, others = place[decisive], others[decisive]
        for start in range(0, len(place), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            n_larger += np.bincount(
                place[some][self._is_larger(pairs[place[some]], others[some])], minlength=len(pairs)
            )
        return n_larger

    def _is_larger(self, pairs: Ints, others: Ints) -> Bools:
        """Whether the other latent beside each pair is larger than the pair's own, exactly."""
        own = self._latents[pairs]
        x = self._x[torch.from_numpy(self._rows[pairs])]
        # By the same additions, so that equal encoder rows have equal values.
        value, own_value = (
            ((self._weight[latents] * x).sum(dim=1) + self._bias[latents]).numpy()
            for latents in map(torch.from_numpy, (others, own))
        )
        larger: Bools = (value > own_value) | ((value == own_value) & (others < own))
        return larger


def _count(marks: Bools) -> Ints:
    """How many of each row [n, m] are true; the rows may lie in memory column by column."""
    if marks.flags.c_contiguous:
        return np.array([np.count_nonzero(row) for row in marks], np.int64)
    n, m = marks.shape
    counts: Ints
    if not marks.flags.f_contiguous or m % _LANES or m // _LANES > np.iinfo(np.uint8).max:
        counts = marks.sum(axis=1, dtype=np.int64)
    else:
        # Sums of bytes, none of which overflows.
        lanes: NDArray[np.uint64] = marks.T.reshape(m // _LANES, _LANES * n).view(np.uint64).sum(axis=0)
        counts = lanes.view(np.uint8).reshape(_LANES, n).sum(axis=0, dtype=np.int64)
    return counts


def _of_pairs(values: NDArray[Any], places: Ints) -> NDArray[Any]:
    """Rows of the values, some more than once."""
    in_place = len(places) == len(values) and bool((places == np.arange(len(values))).all())
    return values if in_place else values[places]


def _distinct(ascending: Ints) -> tuple[Ints, Ints]:
    """The different numbers, and which of them each entry is."""
    is_new = np.ones(len(ascending), np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=is_new[1:])
    return ascending[is_new], is_new.cumsum() - 1


def _comparable(values: Tensor, *, bits: bool = False) -> NDArray[Any]:
    """Numbers that NumPy, several times faster here than torch, orders as the values.

    bits: of bfloat16, the bits. Those of positive numbers are ordered like them, and above those of negative ones.
    """
    if bits:
        values = values.view(torch.int16)
    elif values.dtype == torch.bfloat16:  # which NumPy does not have
        values = values.float()
    return values.numpy()
