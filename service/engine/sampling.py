"""Chooses the next token of every row of a generation step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.work import SamplingOptions

FIRST_NUCLEUS_TOKENS = 256


class RowSampler:
    """The sampling options of one sequence and its own random numbers, one a token."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        # On the host, so that a seed means the same on every device; torch's own generator there reads 32 bits of it.
        self._generator = np.random.Generator(np.random.PCG64(options.seed))

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        return self._generator.random()


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One entry a row."""

    ids: list[int]
    logprobs: list[float]
    """Log-probability of the token under the logits as they are, before temperature and cuts."""
    finite: list[bool]
    """False where logits are NaN or infinite; the row's token means nothing then."""


def sample(logits: Tensor, samplers: Sequence[RowSampler]) -> SampledTokens:
    """Samples one token a row from `logits` [B, vocab], float32.

    A row's token comes from its own logits and random numbers alone: it is the first token at which the cumulative
    probability, in the order of token ids and in float64, exceeds a uniform number. Rounding differences between
    batches then change a token only where that number falls within them.
    """
    normalizer = logits.logsumexp(dim=1)
    finite = normalizer.isfinite() & logits.amin(dim=1).isfinite()
    ids = logits.argmax(dim=1)
    rows = [row for row, sampler in enumerate(samplers) if sampler.options.temperature > 0]
    if rows:
        every = len(rows) == len(samplers)
        drawn = _draw(logits if every else logits[rows], [samplers[row] for row in rows])
        ids = drawn if every else ids.index_copy(0, torch.tensor(rows, device=ids.device), drawn)
    logprobs = logits.gather(1, ids[:, None]).squeeze(1) - normalizer
    return SampledTokens(ids.tolist(), logprobs.tolist(), finite.tolist())


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
    """Zeroes all but the smallest set of largest weights that has at least `shares[row]` of the sum; 1 keeps all."""
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
