"""Chooses the next token of every row of a generation step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_runtime.dictionary.features import all_finite
from service.engine.work import SamplingOptions

FIRST_NUCLEUS_TOKENS = 256


class RowSampler:
    """The sampling options of one sequence, its random numbers (one a token), and its tokens for the penalty."""

    def __init__(self, options: SamplingOptions, sample: int = 0, tokens: Iterable[int] = ()) -> None:
        """`sample` is the sequence's number among those of one seed; `tokens` its prompt."""
        self.options = options
        # On the host, so that a seed means the same on every device. torch's generator reads only 32 bits of it.
        seed = np.random.SeedSequence(options.seed, spawn_key=(sample,)) if sample else options.seed
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._penalized = dict.fromkeys(tokens) if options.repetition_penalty != 1 else None

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        return self._generator.random()

    @property
    def penalized(self) -> list[int]:
        """The distinct tokens of the sequence; empty without a repetition penalty."""
        return list(self._penalized or ())

    def append(self, token: int) -> None:
        """The sequence goes on with `token`."""
        if self._penalized is not None:
            self._penalized[token] = None


class SampledToken(NamedTuple):
    """The token that one row sampled."""

    id: int
    logprob: float
    """Log-probability of the token under the logits as they are, before penalty, temperature and cuts."""
    finite: bool
    """False if a logit is NaN or infinite. Then the token means nothing."""
    top: list[tuple[int, float]]
    """The likeliest tokens with their log-probabilities, as many as were asked for."""


def sample(
    logits: Tensor, samplers: Sequence[RowSampler], top_logprobs: Sequence[int] | None = None
) -> list[SampledToken]:
    """Samples one token a row from `logits` [B, vocab], float32. `top_logprobs`: likeliest tokens to return.

    A row's token depends on its logits and its random number u alone, by inverse transform sampling in float64:

        token = min { t : p[0] + ... + p[t] > u },   u uniform in [0, 1)

    Logits of different batches differ by rounding. That changes a token only where u is within rounding of a cumulative
    probability, or two tokens at a cut (top k, top p) are that near to each other. At temperature 0 it changes a token
    only where the two largest logits are that near.
    """
    log_probabilities = logits.log_softmax(dim=1)
    finite = [True] * len(samplers) if all_finite(logits) else logits.isfinite().all(dim=1).tolist()
    scores = _penalize(logits, samplers)
    ids = _places_of_largest(scores)
    rows = [row for row, sampler in enumerate(samplers) if sampler.options.temperature > 0]
    if rows:
        every = len(rows) == len(samplers)
        drawn = _draw(scores if every else scores[rows], [samplers[row] for row in rows])
        ids = drawn if every else ids.index_copy(0, torch.tensor(rows, device=ids.device), drawn)
    logprobs = log_probabilities.gather(1, ids[:, None]).squeeze(1)
    tops = _likeliest(log_probabilities, top_logprobs) if top_logprobs and any(top_logprobs) else [[]] * len(samplers)
    return list(map(SampledToken, ids.tolist(), logprobs.tolist(), finite, tops))


def _places_of_largest(scores: Tensor) -> Tensor:
    if scores.device.type != "cpu":
        return scores.argmax(dim=1)
    return torch.from_numpy(scores.numpy().argmax(axis=1))  # several times faster here than torch's


def _penalize(logits: Tensor, samplers: Sequence[RowSampler]) -> Tensor:
    """The logits after each row's repetition penalty; the same tensor if no row has one.

    Otherwise in float64: the smallest and largest penalties would make float32 logits infinite.
    """
    if all(sampler.options.repetition_penalty == 1 for sampler in samplers):
        return logits
    scores = logits.double()
    for row, sampler in enumerate(samplers):
        if sampler.options.repetition_penalty != 1:
            tokens = torch.tensor(sampler.penalized, device=logits.device)
            penalty = sampler.options.repetition_penalty
            penalized = scores[row, tokens]
            scores[row, tokens] = torch.where(penalized < 0, penalized * penalty, penalized / penalty)
    return scores


def _likeliest(log_probabilities: Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    rows = [row for row, count in enumerate(counts) if count]
    k = min(max(counts), log_probabilities.shape[1])
    values, ids = log_probabilities[rows].topk(k, dim=1)
    tops: list[list[tuple[int, float]]] = [[] for _ in counts]
    for row, row_ids, row_values in zip(rows, ids.tolist(), values.tolist(), strict=True):
        tops[row] = list(zip(row_ids, row_values, strict=True))[: counts[row]]
    return tops


def _draw(logits: Tensor, samplers: Sequence[RowSampler]) -> Tensor:
    """One token id a row, int64 [B], by inverse transform sampling."""
    options = [sampler.options for sampler in samplers]
    weights = _column([option.temperature for option in options], logits)
    # Subtracting the maximum first keeps the smallest temperatures from overflowing.
    weights = ((logits.double() - logits.amax(dim=1, keepdim=True)) / weights).exp_()
    limits = [option.top_k if 0 < option.top_k < logits.shape[1] else 0 for option in options]
    if any(limits):
        weights = _keep_top_k(weights, limits)
    shares = [option.top_p if 0 < option.top_p < 1 else 1.0 for option in options]
    if min(shares) < 1:
        weights = _keep_nucleus(weights, shares)
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1:]
    target = _column([sampler.uniform() for sampler in samplers], logits) * total
    # Strictly below the total, so that the last token with a weight is the last one that can be drawn.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _keep_top_k(weights: Tensor, limits: Sequence[int]) -> Tensor:
    """Zeroes all but the `limits[row]` largest weights of each row; 0 keeps all."""
    largest = weights.topk(max(limits), dim=1).indices
    rank = torch.arange(largest.shape[1], device=weights.device)
    limit = torch.tensor(limits, device=weights.device)[:, None]
    kept = (limit == 0).expand_as(weights).clone()
    kept.scatter_(1, largest, (rank < limit) | (limit == 0))
    return weights.masked_fill(~kept, 0)


def _keep_nucleus(weights: Tensor, shares: Sequence[float]) -> Tensor:
    """Zeroes all but the fewest largest weights that make up at least `shares[row]` of the sum; 1 keeps all."""
    share = _column(shares, weights)
    needed = share * weights.sum(dim=1, keepdim=True)
    cut = share < 1
    # The nucleus is nearly always small: look at a few hundred tokens before sorting the whole vocabulary.
    n = min(FIRST_NUCLEUS_TOKENS, weights.shape[1])
    largest, where = weights.topk(n, dim=1)
    if n < weights.shape[1] and bool((cut & (largest.sum(dim=1, keepdim=True) < needed)).any()):
        largest, where = weights.sort(dim=1, descending=True)
    before = largest.cumsum(dim=1) - largest
    kept = (~cut).expand_as(weights).clone()
    kept.scatter_(1, where, (before < needed) | ~cut)
    return weights.masked_fill(~kept, 0)


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)[:, None]
