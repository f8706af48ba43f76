"""From the encoder's padded features to the rows that were asked for, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.dictionary.ranking import ranking_table
from sae_runtime.dictionary.statistics import LatentStatistics
from service.engine.work import Csr, Selection


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [start, end) of a batch of features, and the selection that applies to them."""

    start: int
    end: int
    selection: Selection
    combine: Literal["none", "max", "mean", "sum"] = "none"
    """none: the range keeps its rows. Else they become one row, in which a silent latent counts as 0."""


def select(features: SparseFeatures, ranges: Sequence[RowRange], statistics: LatentStatistics | None) -> list[Csr]:
    """The rows of each range, in order. The ranges may overlap only where their selections are equal.

    All rows are sorted in the order of their selection's `rank_by`, combined rows too. Sorting by activation leaves
    single rows as `features` has them; the other orders need the dictionary's statistics.
    """
    indices = features.indices.cpu().numpy()  # [n, k]
    values = features.values.float().cpu().numpy()  # [n, k]
    indices, values = _in_order(indices, values, ranges, statistics)
    listed = _listed(indices, values, features.n_latents, ranges)
    splits = np.zeros(len(indices) + 1, dtype=np.uint32)
    if listed.all():
        splits[1:] = np.arange(1, len(indices) + 1) * indices.shape[1]
        flat_indices, flat_values = indices.reshape(-1).astype(np.uint32), values.reshape(-1)
    else:
        np.cumsum(np.count_nonzero(listed, axis=1), out=splits[1:])
        flat_indices, flat_values = indices[listed].astype(np.uint32), values[listed]
    combined = iter(_combine(splits, flat_indices, flat_values, [r for r in ranges if r.combine != "none"], statistics))
    everything = Csr(splits, flat_indices, flat_values)
    return [next(combined) if r.combine != "none" else everything[r.start : r.end] for r in ranges]


def join_rows(pieces: Sequence[Csr]) -> Csr:
    """The rows of all pieces, one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    splits = [np.zeros(1, dtype=np.uint32)]
    for piece in pieces:
        splits.append(piece.row_splits[1:] + splits[-1][-1])
    return Csr(
        np.concatenate(splits),
        np.concatenate([piece.indices for piece in pieces]),
        np.concatenate([piece.values for piece in pieces]),
    )


def join_arrays(arrays: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    """Joins the arrays of a request's pieces; None if no piece has one."""
    present = [array for array in arrays if array is not None]
    if len(present) > 1:
        return np.concatenate(present)
    return present[0] if present else None


def _in_order(
    indices: NDArray[np.int64],
    values: NDArray[np.float32],
    ranges: Sequence[RowRange],
    statistics: LatentStatistics | None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The entries [n, k] of each row in the order that its selection asks for; padding comes last."""
    for ranking in {r.selection.rank_by for r in ranges} - {"activation"}:
        rows = np.concatenate([np.arange(r.start, r.end) for r in ranges if r.selection.rank_by == ranking])
        latents, activations = indices[rows], values[rows]
        scores = ranking_table(statistics, ranking).scores(latents, activations)
        order = np.argsort(np.where(latents < 0, np.inf, -scores), axis=1, kind="stable")
        indices, values = indices.copy(), values.copy()
        indices[rows] = np.take_along_axis(latents, order, axis=1)
        values[rows] = np.take_along_axis(activations, order, axis=1)
    return indices, values


def _listed(
    indices: NDArray[np.int64], values: NDArray[np.float32], n_latents: int, ranges: Sequence[RowRange]
) -> NDArray[np.bool_]:
    """A mask [n, k] of the entries that the selections keep."""
    listed: NDArray[np.bool_] = indices >= 0
    kinds = {row_range.selection.kind for row_range in ranges}
    n, width = indices.shape
    if "top_k" in kinds:  # rows are in the order of their rank
        most = np.full(n, width)
        for row_range in ranges:
            if row_range.selection.kind == "top_k":
                most[row_range.start : row_range.end] = row_range.selection.k
        listed &= np.arange(width) < most[:, None]
    if "threshold" in kinds:
        above = np.full(n, -np.inf, dtype=np.float32)
        for row_range in ranges:
            if row_range.selection.kind == "threshold":
                above[row_range.start : row_range.end] = row_range.selection.threshold
        listed &= values > above[:, None]
    if "features" in kinds:
        tables: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        for row_range in ranges:
            if row_range.selection.kind == "features":
                chosen = row_range.selection.features
                if chosen not in tables:
                    tables[chosen] = np.zeros(n_latents, dtype=np.bool_)
                    tables[chosen][list(chosen)] = True
                rows = slice(row_range.start, row_range.end)
                listed[rows] &= tables[chosen][indices[rows]]  # the padding's -1 reads the last latent, and stays out
    return listed


def _combine(
    splits: NDArray[np.uint32],
    indices: NDArray[np.uint32],
    values: NDArray[np.float32],
    ranges: Sequence[RowRange],
    statistics: LatentStatistics | None,
) -> list[Csr]:
    """One row a range. Sorts the entries of all ranges by (range, latent), then reduces neighbours with equal keys.

    group    0 0 0 0 | 1 1     the range
    latent   3 3 5 8 | 2 3
    value    1 4 2 1 | 6 1
    begins   0   2 3 | 4 5     with "sum": 5 2 1 | 6 1
    """
    if not ranges:
        return []
    first = [int(splits[r.start]) for r in ranges]
    counts = [int(splits[r.end]) - start for r, start in zip(ranges, first, strict=True)]
    entries = np.concatenate([np.arange(start, start + count) for start, count in zip(first, counts, strict=True)])
    group = np.repeat(np.arange(len(ranges)), counts)
    latent = indices[entries].astype(np.int64)
    n_latents = int(latent.max(initial=0)) + 1
    order = np.argsort(group * n_latents + latent)
    group, latent = group[order], latent[order]
    value = values[entries][order].astype(np.float64)

    begins = np.flatnonzero(np.diff(group * n_latents + latent, prepend=-1))
    rows = []
    if len(begins):
        n_present = np.diff(begins, append=len(value))
        group, latent = group[begins], latent[begins]
        n_rows = np.array([r.end - r.start for r in ranges])[group]
        how = np.array([r.combine for r in ranges])[group]
        total = np.add.reduceat(value, begins)
        largest = np.maximum.reduceat(value, begins)
        # A latent is 0 on the rows where it is silent. That matters for the maximum if all its values are negative.
        largest = np.where(n_present < n_rows, np.maximum(largest, 0), largest)
        result = np.where(how == "max", largest, np.where(how == "mean", total / n_rows, total))
        group, latent, result = (column[result != 0] for column in (group, latent, result))
        score = result
        for ranking in {r.selection.rank_by for r in ranges} - {"activation"}:
            is_ranked = np.array([r.selection.rank_by == ranking for r in ranges])[group]
            score = np.where(is_ranked, ranking_table(statistics, ranking).scores(latent, result), score)
        order = np.argsort(_by_value(group, score))
        group, latent, result = group[order], latent[order], result[order]
    else:
        result = value
    ends = np.searchsorted(group, np.arange(len(ranges) + 1))
    flat_indices, flat_values = latent.astype(np.uint32), result.astype(np.float32)
    for start, end in pairwise(ends.tolist()):
        rows.append(Csr(np.array([0, end - start], dtype=np.uint32), flat_indices[start:end], flat_values[start:end]))
    return rows


def _by_value(group: NDArray[np.int64], value: NDArray[np.float64]) -> NDArray[np.int64]:
    """A key that sorts by group, then by falling value: key = group * 2^33 - rising(float32(value)).

    One sort of integers is several times faster than np.lexsort.
    """
    bits = value.astype(np.float32).view(np.int32).astype(np.int64)
    # The bits of positive floats rise with them; those of negative floats fall, after the sign.
    rising = np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    return (group << 33) - rising
