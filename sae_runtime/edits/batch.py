"""All edits of a packed batch: the tokens and latents that they touch as index arrays, kept while nothing changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.readings import Places, Readings
from sae_runtime.edits.apply import Combinations, DictionaryEdits, SiteEdits
from sae_runtime.edits.row import Combination, ReadyCondition, ReadyEdit, RowEdits, Threshold
from sae_runtime.model.sites import Site

Indices = NDArray[np.int64]
ALWAYS = 0
"""Place in `holds` (see SiteEdits) of what always holds."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """Where in its row the tokens are that a row brings to a packed batch, and the row's edits."""

    edits: RowEdits | None
    past: int
    """Position in the row of the first of the tokens."""
    length: int
    """How many they are."""
    tokens: Sequence[int] | None = None
    """The row's ids up to its last token in the batch; needed by edits after a text."""


class BatchEdits:
    """The edits of the rows of a packed batch, in its order.

    Tokens that no edit covers come out bitwise as they went in. It may serve any number of forwards of the same rows,
    one after the other; not two at once.
    """

    def __init__(self, rows: Sequence[BatchRow] = ()) -> None:
        """Rows whose edits cover none of their tokens here cost nothing."""
        self._key = _key(rows)
        self._by_site = _by_site(rows)
        self.sites: tuple[Site, ...] = tuple(self._by_site)
        """Where `apply` must be called, in this order: edited sites, and those that a later edit's condition reads."""
        self.edited_sites = frozenset(site for site, edits in self._by_site.items() if edits.changes)
        """Where activations change."""
        self._thresholds: list[Tensor] = []  # whether they hold, of the present forward, dictionary by dictionary

    def __bool__(self) -> bool:
        return bool(self.sites)

    def for_step(self, rows: Sequence[BatchRow]) -> BatchEdits:
        """The edits of a running batch's next step: these very ones where the same edits cover the same places.

        Then a step costs a comparison a row, and nothing is sent to the device. That is so while every row brings one
        token, and its edits cover that token as they covered the one before.
        """
        key = _key(rows)
        return self if key is not None and key == self._key else BatchEdits(rows)

    def apply(self, site: Site, x: Tensor, readings: Readings | None = None) -> Tensor:
        """The edited activations of a site, x [N, width] -> [N, width]; x itself where nothing is to be done.

        `readings`: those of the present forward, to share with others. Latents are read without gradient: to autograd
        an edit is a constant added to x.
        ValueError: x is not finite at an edited token; EditOutOfRange (a ValueError that names the rows): the edited
        values overflow x's dtype, or change more than `max_relative_change` allows.
        """
        edits = self._by_site.get(site)
        if edits is None:
            return x
        if len(self._thresholds) < edits.n_earlier:
            raise RuntimeError(f"{site} is edited before the sites that its conditions read: {self.sites}")
        del self._thresholds[edits.n_earlier :]
        return edits.apply(x, self._thresholds, Readings() if readings is None else readings)


def _key(rows: Sequence[BatchRow]) -> tuple[object, ...] | None:
    """Equal for two steps of the same edits on the same places; None where a row brings more than one token."""
    key: list[object] = []
    for row in rows:
        if not row.edits:
            key.append(row.length)
        elif row.length == 1:
            key += (row.edits, row.edits.key_at(row.past, row.tokens))
        else:
            return None
    return tuple(key)


# Making the index arrays


@dataclass(eq=False)
class _Condition:
    """A condition on some tokens."""

    tokens: Places
    condition: ReadyCondition
    inner: tuple[_Condition, ...] = ()
    places: Indices = field(default_factory=lambda: np.zeros(0, np.int64))  # in `holds`, once they are known

    @property
    def height(self) -> int:
        """How many combinations there are inside one another."""
        return 1 + max(inner.height for inner in self.inner) if self.inner else 0

    @property
    def threshold(self) -> Threshold:
        assert isinstance(self.condition, Threshold)
        return self.condition

    @property
    def latent(self) -> int:
        """Of a threshold."""
        return self.threshold.latent


@dataclass(eq=False)
class _Edit:
    """An edit on some tokens."""

    tokens: Places
    edit: ReadyEdit
    positions: Indices
    condition: _Condition | None

    @property
    def latent(self) -> int:
        return self.edit.latent


@dataclass(eq=False)
class _Collected:
    """What is read and changed in one dictionary."""

    edits: list[_Edit] = field(default_factory=list)
    replacements: list[_Edit] = field(default_factory=list)
    thresholds: list[_Condition] = field(default_factory=list)

    @property
    def tokens(self) -> Places:
        items: list[_Edit | _Condition] = [*self.edits, *self.replacements, *self.thresholds]
        return np.unique(_joined([item.tokens for item in items]))


class _Collector:
    """Collects edits row by row. Dictionaries are told apart by identity: a name may be loaded anew."""

    def __init__(self) -> None:
        self.dictionaries: dict[tuple[Site, Dictionary], _Collected] = {}
        self.combinations: dict[Site, list[_Condition]] = {}  # by the site of the edit

    def add(self, edit: ReadyEdit, tokens: Places, positions: Indices) -> None:
        condition = None if edit.condition is None else self._condition(edit.condition, tokens, edit.site)
        collected = self._of(edit.site, edit.dictionary)
        found = _Edit(tokens, edit, positions, condition)
        (collected.replacements if edit.replaces else collected.edits).append(found)

    def _of(self, site: Site, dictionary: Dictionary) -> _Collected:
        return self.dictionaries.setdefault((site, dictionary), _Collected())

    def _condition(self, condition: ReadyCondition, tokens: Places, site: Site) -> _Condition:
        if isinstance(condition, Threshold):
            found = _Condition(tokens, condition)
            self._of(condition.site, condition.dictionary).thresholds.append(found)
        else:
            inner = tuple(self._condition(one, tokens, site) for one in condition.inner)
            found = _Condition(tokens, condition, inner)
            self.combinations.setdefault(site, []).append(found)
        return found


def _by_site(rows: Sequence[BatchRow]) -> dict[Site, SiteEdits]:
    """In order of computation."""
    collector, start = _Collector(), 0
    for row in rows:
        for edit in row.edits.ready if row.edits else ():
            assert row.edits is not None
            offsets = np.asarray(row.edits.offsets(edit, row.past, row.length, row.tokens), np.int64)
            if len(offsets):
                collector.add(edit, offsets + start, offsets + row.past)
        start += row.length
    row_of_token = np.arange(len(rows)).repeat([row.length for row in rows])
    limits = np.array([row.edits.max_relative_change if row.edits else math.inf for row in rows])

    sites: dict[Site, SiteEdits] = {}
    n_thresholds = n_earlier = 0
    groups = sorted(collector.dictionaries.items(), key=lambda item: item[0][0])
    for site, group in groupby(groups, key=lambda item: item[0][0]):
        here = {dictionary: collected for (_, dictionary), collected in group}
        thresholds = [threshold for collected in here.values() for threshold in collected.thresholds]
        n_thresholds = _number(thresholds, 1 + n_thresholds) - 1
        dtypes = [dictionary.dtype for dictionary in here]
        device = _Device(next(iter(here)).device, torch.float64 if torch.float64 in dtypes else torch.float32)
        combinations = _combinations(collector.combinations.get(site, []), 1 + n_thresholds, device)
        tokens = np.unique(np.concatenate([collected.tokens for collected in here.values()]))
        limit = limits[row_of_token[tokens]]
        sites[site] = SiteEdits(
            site=site,
            tokens=tokens,
            index=device.put(tokens),
            rows=row_of_token[tokens],
            limits=device.put(limit[:, None]) if np.isfinite(limit).any() else None,
            dictionaries=tuple(_dictionary(*item, tokens, device) for item in here.items()),
            combinations=combinations,
            n_earlier=n_earlier,
        )
        n_earlier += sum(bool(collected.thresholds) for collected in here.values())
    return sites


@dataclass(frozen=True)
class _Device:
    device: torch.device
    dtype: torch.dtype
    """Of the arithmetic."""

    def put(self, array: NDArray[Any]) -> Tensor:
        """The array as a tensor; numbers in the dtype of the arithmetic."""
        tensor = torch.from_numpy(array)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


def _number(conditions: Sequence[_Condition], first: int) -> int:
    """Gives conditions their places in `holds`, one for each token; the next free place."""
    for condition in conditions:
        condition.places = np.arange(first, first + len(condition.tokens))
        first += len(condition.tokens)
    return first


def _combinations(found: Sequence[_Condition], first: int, device: _Device) -> tuple[Combinations, ...]:
    """The combinations of one site, whose places in `holds` begin with `first`; inner ones before outer ones."""
    levels = []
    for _, level in groupby(sorted(found, key=lambda item: item.height), key=lambda item: item.height):
        conditions = list(level)
        end = _number(conditions, first)
        needed = np.empty(end - first)
        inner, of = [], []
        for condition in conditions:
            assert isinstance(condition.condition, Combination)
            needed[condition.places - first] = condition.condition.needed
            inner += [one.places for one in condition.inner]
            of += [condition.places - first for _ in condition.inner]
        levels.append(Combinations(*map(device.put, (np.concatenate(inner), np.concatenate(of), needed))))
        first = end
    return tuple(levels)


def _dictionary(dictionary: Dictionary, collected: _Collected, site_tokens: Places, device: _Device) -> DictionaryEdits:
    edits, thresholds, replacements = collected.edits, collected.thresholds, collected.replacements
    tokens = collected.tokens
    latents = np.unique(np.array([e.latent for e in edits] + [t.latent for t in thresholds], np.int64))

    def pairs(items: Sequence[_Edit] | Sequence[_Condition]) -> Indices:
        column = np.searchsorted(latents, np.array([item.latent for item in items], np.int64))
        counts = [len(item.tokens) for item in items]
        return np.searchsorted(tokens, _joined([item.tokens for item in items])) * len(latents) + column.repeat(counts)

    arithmetic = _spread([(e.edit.scale, e.edit.shift, e.edit.minimum, e.edit.maximum) for e in edits], edits, 4)
    start = 0
    for item in edits:
        if item.edit.shifts is not None:
            arithmetic[1, start : start + len(item.tokens)] = item.edit.shifts[item.positions]
        start += len(item.tokens)
    compare = [(t.threshold.sign * t.threshold.threshold, t.threshold.sign) for t in thresholds]
    edited, compared = pairs(edits), pairs(thresholds)
    looked_at = np.zeros((len(tokens), len(latents)), np.bool_)
    looked_at.reshape(-1)[edited[_depends_on_latent(arithmetic)]] = True
    looked_at.reshape(-1)[compared] = True
    replaced = np.searchsorted(tokens, _joined([item.tokens for item in replacements]))
    conditions, replaced_conditions = _conditions(edits), _conditions(replacements)
    return DictionaryEdits(
        dictionary=dictionary,
        tokens=tokens,
        at_site=None if len(tokens) == len(site_tokens) else device.put(np.searchsorted(site_tokens, tokens)),
        latents=device.put(latents),
        looked_at=device.put(looked_at),
        pairs=device.put(edited),
        arithmetic=device.put(arithmetic),
        clamps=bool(np.isfinite(arithmetic[2:]).any()),
        conditions=None if conditions is None else device.put(conditions),
        threshold_pairs=device.put(compared),
        thresholds=device.put(_spread(compare, thresholds, 2)),
        replaced=device.put(replaced),
        replaced_conditions=None if replaced_conditions is None else device.put(replaced_conditions),
    )


def _joined(arrays: Sequence[Indices]) -> Indices:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _spread(
    numbers: Sequence[tuple[float, ...]], items: Sequence[_Edit] | Sequence[_Condition], width: int
) -> NDArray[np.float64]:
    """[width, number of tokens]: the numbers of every item on each of its tokens."""
    return np.array(numbers, np.float64).reshape(-1, width).T.repeat([len(item.tokens) for item in items], axis=1)


def _conditions(edits: Sequence[_Edit]) -> Indices | None:
    """The places of the edits' conditions in `holds`, on each of their tokens; None if there are none."""
    if all(item.condition is None for item in edits):
        return None
    return np.concatenate(
        [np.full(len(e.tokens), ALWAYS) if e.condition is None else e.condition.places for e in edits]
    )


def _depends_on_latent(arithmetic: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether what an edit adds depends on the latent, of arithmetic [4, P]: not if it only adds a number."""
    scale, _, minimum, maximum = arithmetic
    depends: NDArray[np.bool_] = (scale != 1) | np.isfinite(minimum) | np.isfinite(maximum)
    return depends
