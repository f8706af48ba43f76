"""Makes the examples that labels are found on and tested on from what the pass over the text kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.contexts import ChosenContexts
from sae_runtime.catalogue.examples import Examples, LatentExamples
from sae_runtime.catalogue.pages import PageMaker
from sae_runtime.catalogue.records import Label
from sae_runtime.catalogue.vocabulary import Vocabulary

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


FindLabel = Callable[[LatentExamples, Vocabulary, Sequence[int]], Label | None]
"""Finds a label on one half of the examples and tests it on the other; the last are the promoted tokens."""


class ExampleMaker:
    """Makes the examples of every latent.

    Active: all contexts of the half, each token once; to find a label on, more random activations. Silent: random
    tokens, and random activations of the nearest latents at which the latent is silent.
    """

    def __init__(self, maker: PageMaker, nearest: Integers) -> None:
        """`nearest`: [n_latents, c], -1 where there are fewer, as the companions of the collection were made from."""
        self._maker, self._nearest = maker, nearest
        self._collector, self._settings = maker.collection.contexts, maker.settings

    def of(self, latent: int) -> LatentExamples:
        """Of half 0 to find a label on, of half 1 to test it on."""
        return LatentExamples(self._of_half(latent, 0), self._of_half(latent, 1))

    def _of_half(self, latent: int, half: int) -> Examples:
        s, collector = self._settings, self._collector
        quantiles = [collector.of_quantile(latent, half, q) for q in range(collector.n_quantiles)]
        active = ChosenContexts.joined([collector.strongest(latent, half), *quantiles, collector.random(latent, half)])
        tokens, activation = active.token, active.activations[:, s.tokens_before]
        if half == 0:
            more, values = collector.for_labels(latent)
            tokens, activation = np.concatenate([tokens, more]), np.concatenate([activation, values])
        tokens, first = np.unique(tokens, return_index=True)
        activation = activation[first]
        index = self._maker.sample.silent(latent, half, s.label_negatives, s.seed)
        silent = self._maker.sample.token[index]
        hard = self._hard(latent, half)
        return self._examples(
            np.concatenate([tokens, silent, hard]),
            np.concatenate([activation, np.zeros(len(silent) + len(hard), np.float32)]),
            np.repeat([False, True], [len(tokens) + len(silent), len(hard)]),
        )

    def _hard(self, latent: int, half: int) -> Integers:
        """Tokens on which near latents fire and this one does not: of the nearest as many as of the others."""
        companions = self._collector.companions
        lists = []
        for near in self._nearest[latent][self._nearest[latent] >= 0].tolist():
            bit = np.flatnonzero(companions[near] == latent)
            contexts = self._collector.random(near, half)
            is_silent = (contexts.silent >> bit.astype(np.uint64)) & np.uint64(1) if len(bit) else np.zeros(0)
            lists.append(contexts.token[is_silent.astype(bool)] if len(bit) else contexts.token[:0])
        order = np.argsort(
            np.concatenate([np.zeros(0, np.int64), *(np.arange(len(tokens)) for tokens in lists)]), kind="stable"
        )
        tokens = np.concatenate([np.zeros(0, np.int64), *lists])[order]
        _, first = np.unique(tokens, return_index=True)
        chosen: Integers = tokens[np.sort(first)][: self._settings.label_hard_negatives]
        return chosen

    def _examples(self, tokens: Integers, activation: Array, hard: Array) -> Examples:
        text = self._maker.text
        start, end = text.stretch(tokens)
        around = tokens[:, None] + np.arange(1 - self._settings.label_tokens, 1)
        following = text.ids[np.minimum(tokens + 1, text.n_tokens - 1)].astype(np.int64)
        documents = text.document(tokens)
        kinds, languages = self._groups
        return Examples(
            ids=np.where(around >= start[:, None], text.ids[around.clip(min=0)].astype(np.int64), -1),
            next_id=np.where(tokens + 1 < end, following, -1),
            position=text.position(tokens),
            document=documents,
            kind=kinds.of_document[documents],
            language=languages.of_document[documents],
            activation=activation,
            hard=hard,
            kinds=kinds.names,
            languages=languages.names,
        )

    @cached_property
    def _groups(self) -> tuple[_Groups, _Groups]:
        documents = self._maker.text.documents
        return _Groups.of([d.kind for d in documents]), _Groups.of([d.language for d in documents])


@dataclass(frozen=True, eq=False)
class _Groups:
    """A property of documents, such as their kind."""

    names: tuple[str, ...]
    of_document: Integers
    """Index into `names`; -1 of a document without it."""

    @classmethod
    def of(cls, values: list[str]) -> _Groups:
        names = tuple(sorted(set(values) - {""}))
        number = {name: i for i, name in enumerate(names)}
        return cls(names, np.array([number.get(value, -1) for value in values], np.int64))
