"""What dictionaries read in one forward pass: every activation is encoded once, and everybody reads that result.

Whoever needs all latents of a dictionary on some tokens says so with `want` before the activation is there. The first
`read` encodes all of these tokens together; later ones return the same `Reading`:

    readings = Readings()
    readings.want(dictionary, tokens)                        # as often as anybody wants tokens
    features = readings.read(dictionary, x).rows(tokens)     # x [N, width], the activation of the packed batch

A site whose activation is edited has two of them, before and after the edits: edits and their conditions read the one,
watched features the other. At every other site they are the same, and `edited` is False for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import SparseFeatures

Places = NDArray[np.int64]
"""Places of tokens in a packed batch, ascending, without repeats; on the host."""


@dataclass(frozen=True, eq=False)
class Reading:
    """All latents of one dictionary on T tokens of a packed batch."""

    dictionary: Dictionary
    tokens: Places
    """[T]."""
    features: SparseFeatures
    """T rows, in the order of `tokens`."""
    edited: bool
    """Whether the activation was read after edits at its site."""

    def covers(self, tokens: Places) -> bool:
        """Whether all of these tokens were read."""
        return bool(np.isin(tokens, self.tokens, assume_unique=True).all())

    def rows(self, tokens: Places) -> SparseFeatures:
        """The features of some of the tokens, in their order. KeyError: of a token that was not read."""
        if np.array_equal(tokens, self.tokens):
            return self.features
        if not self.covers(tokens):
            raise KeyError(f"tokens that {self.dictionary.name!r} was not asked to read")
        rows = torch.from_numpy(np.searchsorted(self.tokens, tokens))
        return self.features[rows.to(self.features.indices.device)]


class Readings:
    """The readings of one forward pass. Dictionaries are told apart by identity, not by name."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[Dictionary, bool], list[Places]] = {}
        self._made: dict[tuple[Dictionary, bool], Reading] = {}

    @property
    def made(self) -> tuple[Reading, ...]:
        """What has been read, in order; nothing is read twice."""
        return tuple(self._made.values())

    def want(self, dictionary: Dictionary, tokens: Places, *, edited: bool = False) -> None:
        """Asks for all latents on some tokens, before the dictionary is read.

        RuntimeError: it has been read, without these tokens.
        """
        key = dictionary, edited
        if key not in self._made:
            self._wanted.setdefault(key, []).append(tokens)
        elif not self._made[key].covers(tokens):
            raise RuntimeError(f"{dictionary.name!r} was read before these tokens were asked for")

    def covers(self, dictionary: Dictionary, tokens: Places) -> bool:
        """Whether all of these tokens are read in any case, before edits: one may look at them without `want`."""
        wanted = self._wanted.get((dictionary, False))
        return wanted is not None and bool(np.isin(tokens, _union(wanted), assume_unique=True).all())

    def read(self, dictionary: Dictionary, x: Tensor, *, edited: bool = False) -> Reading:
        """What the dictionary reads on the wanted tokens of x [N, width], the activation of the packed batch.

        ValueError as `Dictionary.encode`. KeyError: nobody asked for any token.
        """
        key = dictionary, edited
        if key not in self._made:
            tokens = _union(self._wanted[key])
            rows = x if len(tokens) == len(x) else x[torch.from_numpy(tokens).to(x.device)]
            self._made[key] = Reading(dictionary, tokens, dictionary.encode(rows), edited)
        return self._made[key]


def _union(wanted: list[Places]) -> Places:
    return wanted[0] if len(wanted) == 1 else np.unique(np.concatenate(wanted))
