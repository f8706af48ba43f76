"""Chooses contexts of every latent while text is read, in memory that does not grow with the text.

Of each half of the documents a latent has slots for its strongest activations (one a document), for random ones of each
quantile, and for random ones of all. A slot is 12 bytes and one for each token of the window, so that

    bytes = n_latents x 2 x slots x (12 + window)   (+ 8 a random slot)

with slots = strongest + quantiles x quantile_contexts + random_contexts: 3.8 kB a latent with the default settings and
six quantiles, 500 MB for 131,072 latents. Labels are found on further random activations of half 0, of which only the
token and the value are kept: 12 bytes each, 100 MB for 131,072 latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.firings import Firings
from sae_runtime.catalogue.random_keys import random_bits, random_keys
from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.catalogue.slots import Slots
from sae_runtime.catalogue.text import TextPass

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

STEPS = 255
_COMPANIONS_AT_ONCE = 1 << 13


def half_of(seed: int, documents: Integers) -> Integers:
    """The half that each document belongs to: labels are found in half 0 and tested in half 1."""
    return (random_bits(seed, "half", documents) & np.uint64(1)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class ChosenContexts:
    """m contexts of one latent."""

    token: Integers
    """[m], numbers of the peaks in the whole text."""
    activations: npt.NDArray[np.float32]
    """[m, window], 0 where the latent is silent and beyond the stretch."""
    silent: npt.NDArray[np.uint64]
    """[m]: bit i says that the latent's companion i is silent at the peak; 0 of all but random activations."""

    def __getitem__(self, index: Array | slice) -> ChosenContexts:
        return ChosenContexts(self.token[index], self.activations[index], self.silent[index])

    @classmethod
    def joined(cls, contexts: list[ChosenContexts]) -> ChosenContexts:
        return cls(
            np.concatenate([c.token for c in contexts]),
            np.concatenate([c.activations for c in contexts]),
            np.concatenate([c.silent for c in contexts]),
        )


class ContextCollector:
    """The contexts of every latent so far.

    Rows of the slots are latent x 2 + half, and for quantiles (latent x 2 + half) x quantiles + quantile.
    """

    def __init__(self, bounds: Array, companions: Integers, settings: CatalogueSettings) -> None:
        """Begins without contexts.

        Args:
            bounds: float32 [n_latents, q - 1], ascending: what parts the q quantiles of each latent's activations.
            companions: [n_latents, c] with c at most 64, -1 where there are fewer: latents of which a random
                activation keeps whether they are silent on its token.
        """
        n_latents = len(bounds)
        self._bounds, self.companions, self._settings = bounds, companions, settings
        self.n_quantiles = bounds.shape[1] + 1
        self.before, self.window = settings.tokens_before, settings.tokens_before + 1 + settings.tokens_after
        columns: dict[str, tuple[Any, tuple[int, ...]]] = {
            "token": (np.uint32, ()),
            "scale": (np.float32, ()),
            "activations": (np.uint8, (self.window,)),
        }
        self._strongest = Slots(2 * n_latents, settings.strongest, columns)
        self._quantile = Slots(2 * n_latents * self.n_quantiles, settings.quantile_contexts, columns)
        self._random = Slots(2 * n_latents, settings.random_contexts, columns | {"silent": (np.uint64, ())})
        self._for_labels = Slots(
            n_latents, settings.label_activations, {"token": (np.uint32, ()), "value": (np.float32, ())}
        )

    def add(self, firings: Firings, text: TextPass) -> None:
        """Considers every activation of a pass."""
        latent, token, value = firings.latent, firings.token, firings.value
        seed, number = self._settings.seed, text.first + token
        half = half_of(seed, text.document)[token]
        row = latent * 2 + half

        def windows(chosen: Integers) -> dict[str, Array]:
            return self._windows(firings, text, token[chosen], latent[chosen])

        def windows_with_companions(chosen: Integers) -> dict[str, Array]:
            return windows(chosen) | {"silent": self._silent(firings, token[chosen], latent[chosen])}

        quantile = (value[:, None] > self._bounds[latent]).sum(1)
        keys = random_keys(seed, "quantile", latent, number)
        self._quantile.offer(row * self.n_quantiles + quantile, keys, windows)
        self._random.offer(row, random_keys(seed, "random", latent, number), windows_with_companions)
        fit = np.flatnonzero(half == 0)
        self._for_labels.offer(
            latent[fit],
            random_keys(seed, "labels", latent[fit], number[fit]),
            lambda chosen: {"token": number[fit[chosen]], "value": value[fit[chosen]]},
        )
        first = self._strongest_of_documents(firings, text, row)
        self._strongest.offer(row[first], value[first], lambda chosen: windows(first[chosen]))

    def strongest(self, latent: int, half: int) -> ChosenContexts:
        return self._contexts(self._strongest, 2 * latent + half)

    def of_quantile(self, latent: int, half: int, quantile: int) -> ChosenContexts:
        return self._contexts(self._quantile, (2 * latent + half) * self.n_quantiles + quantile)

    def random(self, latent: int, half: int) -> ChosenContexts:
        return self._contexts(self._random, 2 * latent + half)

    def for_labels(self, latent: int) -> tuple[Integers, npt.NDArray[np.float32]]:
        """Tokens [m] and activations [m] of half 0, for labels to be found on."""
        used = self._for_labels.priority[latent] > 0
        columns = self._for_labels.columns
        return columns["token"][latent][used].astype(np.int64), columns["value"][latent][used]

    def tokens(self) -> Integers:
        """The peaks of all contexts, ascending, each once."""
        tables = (self._strongest, self._quantile, self._random)
        used = [table.columns["token"][table.priority > 0] for table in tables]
        tokens: Integers = np.unique(np.concatenate(used)).astype(np.int64)
        return tokens

    def state(self) -> dict[str, Array]:
        return {f"{name}.{key}": array for name, table in self._tables.items() for key, array in table.state().items()}

    def load(self, state: Mapping[str, Array]) -> None:
        for name, table in self._tables.items():
            table.load({key: state[f"{name}.{key}"] for key in table.state()})

    @property
    def _tables(self) -> dict[str, Slots]:
        return {
            "strongest": self._strongest,
            "quantile": self._quantile,
            "random": self._random,
            "labels": self._for_labels,
        }

    def _strongest_of_documents(self, firings: Firings, text: TextPass, row: Integers) -> Integers:
        """The strongest firing of each latent in each document of the pass, of equal ones the first.

        The first document may have begun in an earlier pass, and have a context already: the weaker of the two goes.
        """
        value, document = firings.value, text.document[firings.token]
        order = np.lexsort((-firings.token, value, document, firings.latent))
        group = np.stack([firings.latent[order], document[order]])
        is_last = np.append((np.diff(group) != 0).any(0), True)[: len(order)]
        first: Integers = order[is_last]
        if text.document_began == text.first or not len(first):
            return first
        goes_on = first[document[first] == text.document[0]]
        table = self._strongest
        same = (table.columns["token"][row[goes_on]] >= text.document_began) & (table.priority[row[goes_on]] > 0)
        earlier = (table.priority[row[goes_on]] * same).max(1)
        stronger = value[goes_on] > earlier
        lines, slots = np.nonzero(same & stronger[:, None])
        table.priority[row[goes_on][lines], slots] = 0  # the new one takes its place
        return np.setdiff1d(first, goes_on[~stronger], assume_unique=True)

    def _windows(self, firings: Firings, text: TextPass, token: Integers, latent: Integers) -> dict[str, Array]:
        around = token[:, None] + np.arange(-self.before, self.window - self.before)  # [m, window]
        inside = (around >= text.begin[token][:, None]) & (around < text.end[token][:, None])
        values = firings.at(np.where(inside, around, token[:, None]), latent[:, None]) * inside
        scale = values.max(1)
        # No activation is rounded to silence.
        steps = np.where(values > 0, np.rint(values * (STEPS / scale[:, None])).clip(min=1), 0)
        return {"token": text.first + token, "scale": scale, "activations": steps}

    def _silent(self, firings: Firings, token: Integers, latent: Integers) -> npt.NDArray[np.uint64]:
        bits = np.zeros(len(token), np.uint64)
        for start in range(0, len(token), _COMPANIONS_AT_ONCE):
            here = slice(start, start + _COMPANIONS_AT_ONCE)
            companions = self.companions[latent[here]]  # [m, c]
            silent = (companions >= 0) & (firings.at(token[here, None], companions.clip(min=0)) == 0)
            weights = np.uint64(1) << np.arange(companions.shape[1], dtype=np.uint64)
            bits[here] = (silent * weights).sum(1, dtype=np.uint64)
        return bits

    def _contexts(self, table: Slots, row: int) -> ChosenContexts:
        used = table.priority[row] > 0
        steps = table.columns["activations"][row][used].astype(np.float32)
        silent = table.columns["silent"][row][used] if "silent" in table.columns else np.zeros(used.sum(), np.uint64)
        return ChosenContexts(
            table.columns["token"][row][used].astype(np.int64),
            steps * (table.columns["scale"][row][used][:, None] / STEPS),
            silent,
        )
