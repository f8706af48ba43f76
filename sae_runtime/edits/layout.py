"""Where the edits of a packed batch are: tokens, latents and conditions as index arrays on the host (numpy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits.row import CompiledEdit, Gate
from sae_runtime.model.sites import Site

Indices = NDArray[np.int64]
ALWAYS = 0
"""Slot of the truth value that always holds; edits without a condition refer to it."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One edit of one row of the batch."""

    part: CompiledEdit
    row: int
    start: int  # place of the row's first token in the packed batch
    past: int  # its position in the row
    offsets: Indices | Sequence[int]  # of the covered tokens, from the row's first in the batch; at least one
    limit: float  # largest relative change

    @property
    def tokens(self) -> list[int]:
        """Places in the packed batch."""
        return [self.start + int(offset) for offset in self.offsets]


@dataclass(eq=False)
class _Node:
    """A condition on n tokens: its slots among the truth values, once they are known."""

    n: int
    inner: list[_Node]
    need: int
    height: int
    slots: Indices = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False)
class GateLevel:
    """m combinations of truth values: combination i holds if at least need[i] of its inner ones do."""

    inner: Indices  # [c] slots
    outer: Indices  # [c] which of the m combinations the inner one belongs to
    need: NDArray[np.float32]  # [m]


@dataclass(frozen=True, eq=False)
class DictionaryLayout:
    """What is read and changed in one dictionary: T tokens, F latents, P edited pairs (token, latent), R replacements.

    A pair is written as token * F + latent, both as places in `tokens` and `features`.
    """

    dictionary: Dictionary
    tokens: Indices  # [T], places in the site's tokens, ascending
    features: Indices  # [F], ascending
    pairs: Indices  # [P], without repeats
    arithmetic: NDArray[np.float64]  # [4, P]: scale, shift, minimum, maximum
    gates: Indices | None  # [P] slots; None if all are ALWAYS
    terms: Indices  # [L] pairs whose latent a condition reads
    thresholds: NDArray[np.float64]  # [L], times the sign
    signs: NDArray[np.float64]  # [L], 1 for "above" and -1 for "at most"
    replaced: Indices  # [R], places in `tokens`
    replaced_gates: Indices | None  # [R] slots


@dataclass(frozen=True, eq=False)
class SiteLayout:
    """One site: N_s tokens of the packed batch that some dictionary reads or changes there."""

    site: Site
    tokens: Indices  # [N_s], places in the packed batch, ascending
    rows: Indices  # [N_s], row of each
    limits: NDArray[np.float64]  # [N_s], largest relative change
    dictionaries: tuple[DictionaryLayout, ...]
    levels: tuple[GateLevel, ...]  # to be evaluated in this order, each adding its m slots behind those there are
    n_earlier: int  # of the arrays of truth values, one a dictionary with terms, those of earlier sites


class _Spread:
    """Things that each apply to some tokens, collected as lists: a batch has many of them with one token each."""

    def __init__(self) -> None:
        self.tokens: list[int] = []  # of one thing after the other
        self.counts: list[int] = []  # tokens of each
        self.features: list[int] = []  # of each
        self.numbers: list[tuple[float, ...]] = []  # of each
        self.nodes: list[_Node | None] = []  # of each: of an edit its gate, of a threshold itself

    def add(self, tokens: Sequence[int], feature: int, numbers: tuple[float, ...], node: _Node | None) -> None:
        self.tokens += tokens
        self.counts.append(len(tokens))
        self.features.append(feature)
        self.numbers.append(numbers)
        self.nodes.append(node)

    def spread_numbers(self, n: int) -> NDArray[np.float64]:
        """[n, number of tokens]: the n numbers of each thing on its tokens."""
        return np.array(self.numbers, np.float64).reshape(-1, n).T.repeat(self.counts, axis=1)

    def spread_features(self) -> Indices:
        return np.array(self.features, np.int64).repeat(self.counts)

    def gates(self) -> Indices | None:
        """The slots of the gates on their tokens; None if there are no conditions."""
        if all(node is None for node in self.nodes):
            return None
        slots = [
            np.full(count, ALWAYS) if node is None else node.slots
            for node, count in zip(self.nodes, self.counts, strict=True)
        ]
        return np.concatenate(slots)


class _Group:
    """What is said about one dictionary so far."""

    def __init__(self, dictionary: Dictionary, site: Site) -> None:
        self.dictionary, self.site = dictionary, site
        self.edits, self.replacements, self.terms = _Spread(), _Spread(), _Spread()
        self.values: list[tuple[int, NDArray[np.float64]]] = []  # shifts of the pairs from the first on

    @property
    def tokens(self) -> Indices:
        """All that are read or edited, ascending."""
        return np.unique(np.array(self.edits.tokens + self.replacements.tokens + self.terms.tokens, np.int64))


class Layout:
    """Collects the edits of a batch."""

    def __init__(self) -> None:
        self._groups: dict[Dictionary, _Group] = {}
        self._nodes: dict[Site, list[_Node]] = {}
        self._rows: dict[int, tuple[int, float]] = {}  # by first token, ascending: its number and limit

    def add(self, entry: Entry) -> None:
        """One edit of one row, on the tokens that it covers; rows come in their order in the batch."""
        part, tokens = entry.part, entry.tokens
        gate = None
        if part.gate is not None:
            gate = self._gate(part.gate, tokens, self._nodes.setdefault(part.site, []))
        group = self._group(part.dictionary, part.site)
        if part.replaces:
            group.replacements.add(tokens, 0, (), gate)
        else:
            if part.values is not None:
                at = np.asarray(entry.offsets, np.int64) + entry.past
                group.values.append((len(group.edits.tokens), part.values[at]))
            group.edits.add(tokens, part.edit.feature, (part.scale, part.shift, part.minimum, part.maximum), gate)
        self._rows[entry.start] = (entry.row, entry.limit)

    def _group(self, dictionary: Dictionary, site: Site) -> _Group:
        # By identity: a name may be loaded anew while edits of the older dictionary still run.
        group = self._groups.get(dictionary)
        if group is None:
            group = self._groups[dictionary] = _Group(dictionary, site)
        return group

    def _gate(self, gate: Gate, tokens: Sequence[int], nodes: list[_Node]) -> _Node:
        leaf = gate.leaf
        if leaf is not None:
            node = _Node(len(tokens), [], 1, 0)
            numbers = (leaf.threshold * leaf.sign, float(leaf.sign))
            self._group(leaf.dictionary, leaf.site).terms.add(tokens, leaf.feature, numbers, node)
            return node
        inner = [self._gate(each, tokens, nodes) for each in gate.inner]
        node = _Node(len(tokens), inner, gate.need, 1 + max(each.height for each in inner))
        nodes.append(node)
        return node

    def finish(self) -> list[SiteLayout]:
        """The sites in order of computation."""
        groups = sorted(self._groups.values(), key=lambda group: group.site)
        n_slots, n_arrays = ALWAYS + 1, 0
        sites = []
        for site, at_site in groupby(groups, key=lambda group: group.site):
            here = list(at_site)
            n_earlier = n_arrays
            for group in here:
                slots = np.arange(n_slots, n_slots + len(group.terms.tokens))
                n_slots += len(slots)
                n_arrays += len(slots) > 0
                at = 0
                for node in group.terms.nodes:
                    assert node is not None, "every threshold is a node"
                    node.slots = slots[at : at + node.n]
                    at += node.n
            levels = _levels(self._nodes.get(site, []), n_slots)
            sites.append(self._site(site, here, levels, n_earlier))
        return sites

    def _site(self, site: Site, groups: Sequence[_Group], levels: tuple[GateLevel, ...], n_earlier: int) -> SiteLayout:
        tokens_of = [group.tokens for group in groups]
        tokens = tokens_of[0] if len(groups) == 1 else np.unique(np.concatenate(tokens_of))
        # Every token is of a row with edits: of the last such row that begins before it.
        own = np.searchsorted(np.array(list(self._rows)), tokens, side="right") - 1
        rows = np.array([row for row, _ in self._rows.values()])[own]
        limits = np.array([limit for _, limit in self._rows.values()])[own]
        dictionaries = tuple(_dictionary(group, each, tokens) for group, each in zip(groups, tokens_of, strict=True))
        return SiteLayout(site, tokens, rows, limits, dictionaries, levels, n_earlier)


def _dictionary(group: _Group, tokens: Indices, site_tokens: Indices) -> DictionaryLayout:
    edits, terms, replacements = group.edits, group.terms, group.replacements
    features = np.unique(np.array(edits.features + terms.features, np.int64))

    def pairs(spread: _Spread) -> Indices:
        column = np.searchsorted(features, spread.spread_features())
        return np.searchsorted(tokens, np.array(spread.tokens, np.int64)) * len(features) + column

    arithmetic = edits.spread_numbers(4)
    for first, values in group.values:
        arithmetic[1, first : first + len(values)] = values
    thresholds, signs = terms.spread_numbers(2)
    return DictionaryLayout(
        dictionary=group.dictionary,
        tokens=np.searchsorted(site_tokens, tokens),
        features=features,
        pairs=pairs(edits),
        arithmetic=arithmetic,
        gates=edits.gates(),
        terms=pairs(terms),
        thresholds=thresholds,
        signs=signs,
        replaced=np.searchsorted(tokens, np.array(replacements.tokens, np.int64)),
        replaced_gates=replacements.gates(),
    )


def _levels(nodes: Sequence[_Node], n_slots: int) -> tuple[GateLevel, ...]:
    """Gives the combinations their slots, lower ones first."""
    levels = []
    for _, same in groupby(sorted(nodes, key=lambda node: node.height), key=lambda node: node.height):
        inner, outer, need = [], [], []
        base = n_slots
        for node in same:
            node.slots = np.arange(n_slots, n_slots + node.n)
            n_slots += node.n
            for each in node.inner:
                inner.append(each.slots)
                outer.append(node.slots - base)
            need.append(np.full(node.n, node.need, np.float32))
        levels.append(GateLevel(np.concatenate(inner), np.concatenate(outer), np.concatenate(need)))
    return tuple(levels)
