"""On which tokens every latent fires, how often and how strongly, and how much of it the token alone explains.

One table of (latent, token) pairs that occur, 20 bytes each; new pairs are gathered, and merged into it at times.
Beyond a limit the pairs of smallest sum of each latent are forgotten. Up to the limit everything is exact. Beyond it,
counts and sums of a kept token miss what was forgotten of it earlier, and `explained` is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

_LEAST_PENDING = 1 << 20
_LEAST_A_LATENT = 64


class TokenSums:
    """Counts and sums of activations of every latent by the token that it fires on."""

    def __init__(self, n_latents: int, vocab_size: int, max_pairs: int) -> None:
        self._n_latents, self._vocab_size = n_latents, vocab_size
        self._max_pairs = max(max_pairs, _LEAST_A_LATENT * n_latents)
        self.occurrences = np.zeros(vocab_size, np.int64)
        """How often each token occurs in the text."""
        self._table = _Pairs.empty()
        self._pending: list[_Pairs] = []

    def add(self, latent: Integers, token: Integers, value: Array, text: Integers) -> None:
        """Adds activations [F] of latents on token ids, and the token ids [n] of the text they are from."""
        self.occurrences += np.bincount(text, minlength=self._vocab_size)
        self._pending.append(_Pairs.of(latent * self._vocab_size + token, value))
        if sum(len(pairs.key) for pairs in self._pending) > max(_LEAST_PENDING, len(self._table.key) // 2):
            self._merge()

    def explained(self, latent: int, total: float, squares: float) -> float | None:
        """Share of the variance of the activation, over all tokens of the text, that the current token explains.

        With S_v and n_v the sum of activations on token v and its occurrences, S and Q the sum and the sum of squares
        of all activations, and N = sum n_v,

            (sum_v S_v^2 / n_v - S^2 / N) / (Q - S^2 / N).

        If tokens of the latent were forgotten, those whose mean S_v / n_v is above S / N keep their term, and the rest
        counts as if it were spread evenly over all other tokens. Activations that were forgotten can only add to that.
        Words that occur once explain themselves, as in every such figure: it is for latents that fire often enough.

        Args:
            total, squares: S and Q.
        """
        token, sums, _ = self.tokens(latent)
        n, of_token = int(self.occurrences.sum()), self.occurrences[token]
        if total - sums.sum() > 1e-6 * total:
            above = sums * n >= total * of_token
            sums, of_token = sums[above], of_token[above]
        between = float((np.square(sums) / of_token).sum()) - total**2 / max(n, 1)
        rest, rest_tokens = total - float(sums.sum()), n - int(of_token.sum())
        if rest_tokens > 0:
            between += max(rest, 0.0) ** 2 / rest_tokens
        variation = squares - total**2 / max(n, 1)
        return min(max(between / variation, 0.0), 1.0) if variation > 1e-12 * max(squares, 1e-300) else None

    def tokens(self, latent: int) -> tuple[Integers, Array, Integers]:
        """Token ids, ascending, with the sum of activations and the count of firings on each."""
        self._merge()
        bounds = np.searchsorted(self._table.key, np.array([latent, latent + 1]) * self._vocab_size)
        here = slice(*bounds)
        return self._table.key[here] - latent * self._vocab_size, self._table.sum[here], self._table.count[here]

    def state(self) -> dict[str, Array]:
        pending = _Pairs.joined(self._pending)
        tables = {"table": self._table, "pending": pending}
        return {"occurrences": self.occurrences} | {
            f"{name}.{key}": array for name, pairs in tables.items() for key, array in vars(pairs).items()
        }

    def load(self, state: Mapping[str, Array]) -> None:
        self.occurrences = state["occurrences"]
        self._table, pending = (
            _Pairs(*(state[f"{name}.{key}"] for key in ("key", "sum", "count"))) for name in ("table", "pending")
        )
        self._pending = [pending]

    def _merge(self) -> None:
        if not self._pending:
            return
        joined = _Pairs.joined([self._table, *self._pending])
        self._pending = []
        self._table = _Pairs.of(joined.key, joined.sum, joined.count)
        if len(self._table.key) > self._max_pairs:
            self._forget()

    def _forget(self) -> None:
        """Keeps the pairs of largest sum: of every latent equally many, half of what there is room for."""
        latent = self._table.key // self._vocab_size
        order = np.lexsort((-self._table.sum, latent))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - np.searchsorted(latent, latent)
        self._table = self._table[rank < self._max_pairs // self._n_latents // 2]


class _Pairs:
    """Pairs by their key, latent x vocabulary + token."""

    def __init__(self, key: Integers, sum: Array, count: Array) -> None:
        self.key, self.sum, self.count = key, sum, count  # int64, float64, uint32

    def __getitem__(self, index: Array) -> _Pairs:
        return _Pairs(self.key[index], self.sum[index], self.count[index])

    @classmethod
    def empty(cls) -> _Pairs:
        return cls(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.uint32))

    @classmethod
    def of(cls, key: Integers, sums: Array, counts: Array | None = None) -> _Pairs:
        """Adds up what has the same key; ascending."""
        order = np.argsort(key, kind="stable")
        key = key[order]
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        if counts is None:
            count = np.diff(np.append(starts, len(key)))
        else:
            count = np.add.reduceat(counts[order], starts) if len(starts) else counts
        total = np.add.reduceat(sums[order].astype(np.float64), starts) if len(starts) else np.zeros(0)
        return cls(key[starts], total, count.astype(np.uint32))

    @classmethod
    def joined(cls, pairs: list[_Pairs]) -> _Pairs:
        pairs = [cls.empty(), *pairs]
        return cls(*(np.concatenate([getattr(p, name) for p in pairs]) for name in ("key", "sum", "count")))
