"""How often and how strongly every latent fires: over tokens, documents, positions, kinds and languages of text.

Memory is about n_latents x (60 + 4 x (histogram bins + position bins + kinds + languages)) bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.firings import Firings
from sae_runtime.catalogue.text import DocumentEntry, TextPass

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

MAX_GROUPS = 64
"""Kinds, and languages, that are counted apart; later ones are not counted by kind."""


class GroupCounts:
    """Firings of every latent by a property of the document, such as its kind; "" has no figures."""

    def __init__(self, n_latents: int) -> None:
        self.names: list[str] = []
        self.fired = np.zeros((n_latents, 0), np.uint32)
        self.tokens = np.zeros(0, np.int64)

    def add(self, firings: Firings, names: Sequence[str], document: Integers) -> None:
        """Adds a pass with the names of its documents, and [n] which of them each token is of."""
        for name in names:
            if name and name not in self.names and len(self.names) < MAX_GROUPS:
                self.names.append(name)
                self.fired = np.pad(self.fired, ((0, 0), (0, 1)))
                self.tokens = np.append(self.tokens, 0)
        number = {name: i for i, name in enumerate(self.names)}
        group = np.array([number.get(name, -1) for name in names], np.int64)[document]
        self.tokens += np.bincount(group[group >= 0], minlength=len(self.names))
        of_firing = group[firings.token]
        counted = of_firing >= 0
        np.add.at(self.fired, (firings.latent[counted], of_firing[counted]), 1)

    def rates(self, latent: int) -> dict[str, float]:
        """Firing rate by name."""
        rates = self.fired[latent] / self.tokens.clip(min=1)
        return {name: float(rate) for name, rate in zip(self.names, rates, strict=True)}

    def state(self) -> dict[str, Array]:
        return {"names": np.array(self.names, np.str_), "fired": self.fired, "tokens": self.tokens}

    def load(self, state: Mapping[str, Array]) -> None:
        self.names = state["names"].tolist()
        self.fired, self.tokens = state["fired"], state["tokens"]


class FiringRates:
    """Counts and sums over all tokens so far."""

    def __init__(self, largest: Array, n_bins: int, context_length: int) -> None:
        """Begins at zero.

        Args:
            largest: float32 [n_latents], the largest activation of each latent as its statistics have it, 0 if it never
                fired: the end of its histogram. A latent without one gets the largest of the first pass it fires in.
        """
        n_latents = len(largest)
        self.largest = largest.astype(np.float32)
        self.n_tokens = 0
        self.n_documents = 0
        self.fired, self.documents = np.zeros((2, n_latents), np.int64)
        self.total, self.squares, self.with_position = np.zeros((3, n_latents))
        """float64 sums of z, z^2 and z log2(1 + position)."""
        self.histogram = np.zeros((n_latents, n_bins), np.uint32)
        """The last bin also holds what is above `largest`."""
        self.by_position = np.zeros((n_latents, position_bin(np.array([context_length - 1]))[0] + 1), np.uint32)
        self.position_tokens = np.zeros(self.by_position.shape[1], np.int64)
        self.kinds, self.languages = GroupCounts(n_latents), GroupCounts(n_latents)
        self._position_sums = np.zeros(2)  # of log2(1 + position) and its square
        self._in_document = np.full(n_latents, -1, np.int64)  # the newest document in which a latent fired
        self._newest_document = np.array([-1])

    @property
    def n_latents(self) -> int:
        return len(self.fired)

    def add(self, firings: Firings, text: TextPass, documents: Sequence[DocumentEntry]) -> None:
        """Counts a pass. `documents`: those of the whole text."""
        latent, value, token = firings.latent, firings.value, firings.token
        log_position = np.log2(1 + text.position)
        self.n_tokens += len(text)
        self.fired += np.bincount(latent, minlength=self.n_latents)
        for sums, weights in (
            (self.total, value),
            (self.squares, np.square(value, dtype=np.float64)),
            (self.with_position, value * log_position[token]),
        ):
            sums += np.bincount(latent, weights, self.n_latents)
        self._position_sums += log_position.sum(), np.square(log_position).sum()

        unknown = self.largest[latent] == 0
        np.maximum.at(self.largest, latent[unknown], value[unknown])
        n_bins = self.histogram.shape[1]
        bins = (value * (n_bins / self.largest[latent])).astype(np.int64).clip(max=n_bins - 1)
        np.add.at(self.histogram, (latent, bins), 1)
        bins = position_bin(text.position)
        self.position_tokens += np.bincount(bins, minlength=len(self.position_tokens))
        np.add.at(self.by_position, (latent, bins[token]), 1)

        present, document = np.unique(text.document, return_inverse=True)
        entries = [documents[i] for i in present]
        self.kinds.add(firings, [entry.kind for entry in entries], document)
        self.languages.add(firings, [entry.language for entry in entries], document)
        # Documents come one after the other: only the first here can have been seen before.
        self.n_documents += len(present) - (self._newest_document[0] in present[:1])
        for i in range(len(present)):
            here = slice(*np.searchsorted(document[token], [i, i + 1]))
            fires = np.unique(latent[here])
            self.documents[fires] += self._in_document[fires] != present[i]
            self._in_document[fires] = present[i]
        self._newest_document[:] = present[-1:]

    def position_correlation(self) -> Array:
        """[n_latents], the correlation of the activation with log2(1 + position), over all tokens; 0 if undefined."""
        n = max(self.n_tokens, 1)
        mean, square = self._position_sums / n
        covariance = self.with_position / n - self.total / n * mean
        variances = self.variance() * max(square - mean**2, 0)
        correlation: Array = np.zeros(self.n_latents)
        np.divide(covariance, np.sqrt(variances), out=correlation, where=variances > 0)
        return correlation

    def variance(self) -> Array:
        """float64 [n_latents], of the activation over all tokens."""
        n = max(self.n_tokens, 1)
        variance: Array = (self.squares / n - np.square(self.total / n)).clip(min=0)
        return variance

    def state(self) -> dict[str, Array]:
        groups = {"kinds": self.kinds, "languages": self.languages}
        return {
            **{name: getattr(self, name) for name in _ARRAYS},
            "counts": np.array([self.n_tokens, self.n_documents]),
            **{f"{name}.{key}": array for name, group in groups.items() for key, array in group.state().items()},
        }

    def load(self, state: Mapping[str, Array]) -> None:
        for name in _ARRAYS:
            setattr(self, name, state[name])
        self.n_tokens, self.n_documents = (int(count) for count in state["counts"])
        for name, group in (("kinds", self.kinds), ("languages", self.languages)):
            group.load({key: state[f"{name}.{key}"] for key in group.state()})


_ARRAYS = (
    *("largest", "fired", "documents", "total", "squares", "with_position", "histogram", "by_position"),
    *("position_tokens", "_position_sums", "_in_document", "_newest_document"),
)


def position_bin(position: Integers) -> Integers:
    """The bin of each position: 0, 1, 2 to 3, 4 to 7, ... are bins 0, 1, 2, 3, ..."""
    return np.frexp(position.astype(np.float64))[1].astype(np.int64)
