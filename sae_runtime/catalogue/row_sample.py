"""A random sample of the text with all activations on it: for tokens without a latent, and for what fires together."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.contexts import half_of
from sae_runtime.catalogue.firings import Firings
from sae_runtime.catalogue.random_keys import random_bits, random_keys
from sae_runtime.catalogue.text import TextPass

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowSample:
    """T tokens of whole stretches, and the F activations on them. Indices count within the sample."""

    token: Integers
    """[T], numbers in the whole text."""
    half: Integers
    """[T], the half of their documents."""
    begin: Integers
    """[T], index of the first token of each token's stretch."""
    end: Integers
    """[T], index after the last."""
    firings: Firings

    @cached_property
    def _by_latent(self) -> tuple[Integers, Integers]:
        """Order of the firings by latent, and where each latent's begin in it."""
        order = np.argsort(self.firings.latent, kind="stable")
        return order, np.searchsorted(self.firings.latent[order], np.arange(self.firings.n_latents + 1))

    def fires_on(self, latent: int) -> Integers:
        """Indices of the tokens on which a latent fires, ascending."""
        order, starts = self._by_latent
        tokens: Integers = self.firings.token[order[starts[latent] : starts[latent + 1]]]
        return tokens

    def silent(self, latent: int, half: int, n: int, seed: int) -> Integers:
        """Indices of up to n random tokens of a half on which a latent is silent."""
        candidates = self._of_half[half]
        if not n or not len(candidates):
            return np.zeros(0, np.int64)
        # Some of those drawn are active or drawn twice, so there are more than needed.
        drawn = random_bits(seed, "silent", latent, half, np.arange(4 * n)) % np.uint64(len(candidates))
        tokens = candidates[drawn.astype(np.int64)]
        tokens = tokens[np.sort(np.unique(tokens, return_index=True)[1])]
        silent: Integers = tokens[~np.isin(tokens, self.fires_on(latent))][:n]
        return silent

    @cached_property
    def _of_half(self) -> list[Integers]:
        return [np.flatnonzero(self.half == half) for half in (0, 1)]


class RowSampler:
    """Keeps random stretches of the text, as few as hold `n_tokens` tokens."""

    def __init__(self, n_latents: int, n_tokens: int, seed: int) -> None:
        self._n_latents, self._wanted, self._seed = n_latents, n_tokens, seed
        self._heap: list[tuple[float, int]] = []  # negative key and first token of each stretch: the largest key first
        self._kept: dict[int, tuple[int, int, Array, Array, Array]] = {}
        self._size = 0

    def add(self, firings: Firings, text: TextPass) -> None:
        starts = np.unique(text.begin)
        keys = random_keys(self._seed, "rows", text.first + starts)
        halves = half_of(self._seed, text.document[starts])
        for start, key, half in zip(starts.tolist(), keys.tolist(), halves.tolist(), strict=True):
            if self._size >= self._wanted and key >= -self._heap[0][0]:
                continue
            end = int(text.end[start])
            here = slice(*firings.splits[[start, end]])
            number = text.first + start
            self._kept[number] = (
                end - start,
                half,
                firings.token[here] - start,
                firings.latent[here].copy(),  # a view would keep the whole pass
                firings.value[here].copy(),
            )
            heapq.heappush(self._heap, (-key, number))
            self._size += end - start
            while self._size - self._kept[self._heap[0][1]][0] >= self._wanted:
                self._size -= self._kept.pop(heapq.heappop(self._heap)[1])[0]

    def sample(self) -> RowSample:
        """What is kept, in the order of the text."""
        numbers = sorted(self._kept)
        kept = [self._kept[number] for number in numbers]
        sizes = np.array([stretch[0] for stretch in kept], np.int64)
        starts = np.concatenate([[0], sizes.cumsum()])[:-1].astype(np.int64) if kept else sizes
        first = np.repeat(np.array(numbers, np.int64) - starts, sizes)
        none = np.zeros(0, np.int64)
        return RowSample(
            token=first + np.arange(sizes.sum()),
            half=np.repeat(np.array([stretch[1] for stretch in kept], np.int64), sizes),
            begin=np.repeat(starts, sizes),
            end=np.repeat(starts + sizes, sizes),
            firings=Firings(
                int(sizes.sum()),
                self._n_latents,
                np.concatenate([none, *(stretch[2] + start for stretch, start in zip(kept, starts, strict=True))]),
                np.concatenate([none, *(stretch[3] for stretch in kept)]),
                np.concatenate([np.zeros(0, np.float32), *(stretch[4] for stretch in kept)]),
            ),
        )

    def state(self) -> dict[str, Array]:
        kept = [(-key, number, *self._kept[number]) for key, number in self._heap]
        return {
            "keys": np.array([stretch[0] for stretch in kept]),
            "stretches": np.array([(*stretch[1:4], len(stretch[4])) for stretch in kept], np.int64).reshape(-1, 4),
            "token": np.concatenate([np.zeros(0, np.int64), *(stretch[4] for stretch in kept)]),
            "latent": np.concatenate([np.zeros(0, np.int64), *(stretch[5] for stretch in kept)]),
            "value": np.concatenate([np.zeros(0, np.float32), *(stretch[6] for stretch in kept)]),
        }

    def load(self, state: Mapping[str, Array]) -> None:
        self._heap = [(-key, int(n)) for key, n in zip(state["keys"].tolist(), state["stretches"][:, 0], strict=True)]
        bounds = np.concatenate([[0], state["stretches"][:, 3].cumsum()])
        self._kept = {}
        for (number, size, half, _), a, b in zip(state["stretches"].tolist(), bounds, bounds[1:], strict=False):
            self._kept[number] = (size, half, *(state[name][a:b] for name in ("token", "latent", "value")))
        self._size = int(state["stretches"][:, 1].sum())
