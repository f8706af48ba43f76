"""From the encoder's padded features to the rows that were asked for, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sae_runtime.dictionary.features import SparseFeatures
from service.engine.work import Csr, Selection


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [start, end) of a batch of features, and what is wanted of them."""

    start: int
    end: int
    selection: Selection
    combine: Literal["none", "max", "mean", "sum"] = "none"
    """none: one row each; else one row for all of them, in which a silent feature counts as 0."""


def select(features: SparseFeatures, ranges: Sequence[RowRange]) -> list[Csr]:
    """The rows of each range, in order. The ranges may overlap only where their selections are equal.

    Rows keep the order of `features`, largest value first; combined rows have it as well.
    """
    indices = features.indices.cpu().numpy()  # [n, k]
    values = features.values.float().cpu().numpy()  # [n, k]
    listed = _listed(indices, values, features.n_latents, ranges)
    splits = np.zeros(len(indices) + 1, dtype=np.uint32)
    if listed.all():
        splits[1:] = np.arange(1, len(indices) + 1) * indices.shape[1]
        flat_indices, flat_values = indices.reshape(-1).astype(np.uint32), values.reshape(-1)
    else:
        np.cumsum(np.count_nonzero(listed, axis=1), out=splits[1:])
        flat_indices, flat_values = indices[listed].astype(np.uint32), values[listed]
    combined = iter(_combine(splits, flat_indices, flat_values, [r for r in ranges if r.combine != "none"]))
    everything = Csr(splits, flat_indices, flat_values)
    return [next(combined) if r.combine != "none" else everything[r.start : r.end] for r in ranges]


def join_rows(parts: Sequence[Csr]) -> Csr:
    """The rows of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    splits = [np.zeros(1, dtype=np.uint32)]
    for part in parts:
        splits.append(part.row_splits[1:] + splits[-1][-1])
    return Csr(
        np.concatenate(splits),
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.values for part in parts]),
    )


def join_arrays(arrays: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    """The arrays of a request's parts as one; None if there are none."""
    given = [array for array in arrays if array is not None]
    if len(given) > 1:
        return np.concatenate(given)
    return given[0] if given else None


def _listed(
    indices: NDArray[np.int64], values: NDArray[np.float32], n_latents: int, ranges: Sequence[RowRange]
) -> NDArray[np.bool_]:
    """Which entries [n, k] the selections leave."""
    listed: NDArray[np.bool_] = indices >= 0
    kinds = {wanted.selection.kind for wanted in ranges}
    n, width = indices.shape
    if "top_k" in kinds:  # rows are sorted by value
        most = np.full(n, width)
        for wanted in ranges:
            if wanted.selection.kind == "top_k":
                most[wanted.start : wanted.end] = wanted.selection.k
        listed &= np.arange(width) < most[:, None]
    if "threshold" in kinds:
        above = np.full(n, -np.inf, dtype=np.float32)
        for wanted in ranges:
            if wanted.selection.kind == "threshold":
                above[wanted.start : wanted.end] = wanted.selection.threshold
        listed &= values > above[:, None]
    if "features" in kinds:
        tables: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        for wanted in ranges:
            if wanted.selection.kind == "features":
                chosen = wanted.selection.features
                if chosen not in tables:
                    tables[chosen] = np.zeros(n_latents, dtype=np.bool_)
                    tables[chosen][list(chosen)] = True
                rows = slice(wanted.start, wanted.end)
                listed[rows] &= tables[chosen][indices[rows]]  # the padding's -1 reads the last latent, and stays out
    return listed


def _combine(
    splits: NDArray[np.uint32],
    indices: NDArray[np.uint32],
    values: NDArray[np.float32],
    ranges: Sequence[RowRange],
) -> list[Csr]:
    """One row for each range: sorts all their entries by (range, latent) and reduces equal neighbours."""
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
        # A latent that is silent on some row is 0 there, which matters where listed values can be negative.
        largest = np.where(n_present < n_rows, np.maximum(largest, 0), largest)
        result = np.where(how == "max", largest, np.where(how == "mean", total / n_rows, total))
        group, latent, result = (part[result != 0] for part in (group, latent, result))
        order = np.argsort(_by_value(group, result))
        group, latent, result = group[order], latent[order], result[order]
    else:
        result = value
    ends = np.searchsorted(group, np.arange(len(ranges) + 1))
    flat_indices, flat_values = latent.astype(np.uint32), result.astype(np.float32)
    for start, end in pairwise(ends.tolist()):
        rows.append(Csr(np.array([0, end - start], dtype=np.uint32), flat_indices[start:end], flat_values[start:end]))
    return rows


def _by_value(group: NDArray[np.int64], value: NDArray[np.float64]) -> NDArray[np.int64]:
    """A key that sorts by group, then by falling value as float32: one sort of integers is several times quicker than
    np.lexsort."""
    bits = value.astype(np.float32).view(np.int32).astype(np.int64)
    # The bits of positive floats rise with them; those of negative floats fall, after the sign.
    rising = np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    return (group << 33) - rising
