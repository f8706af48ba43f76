"""The k largest pre-activations of a token when the latents lie on several workers (Gao et al. 2024, appendix D).

Every shard offers the largest of its own, the k-th largest of all offers is the threshold, and each shard keeps those
of its own that reach it. A shard may hold all k of the largest, so offers of k each are always enough, but k/n_shards
are expected and offers of k each are n_shards times too many. So shards offer a few first, and the rest only for the
*saturated* tokens: those for which some shard's offers all reached the threshold, so that it may have more of them.
That is exact. The paper takes first offers of 4·k/n_shards alone; `complete=False` does the same.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.training.communicator import Communicator

SATURATED_AT_MOST = 0.01
"""Share of tokens that may be expected to need more than the default first offers."""


@dataclass(frozen=True)
class Offers:
    """A shard's largest pre-activations of each token, the largest first."""

    values: Tensor
    """(B, m)"""
    indices: Tensor
    """int64 (B, m)"""

    @classmethod
    def sorted(cls, values: Tensor, indices: Tensor) -> Offers:
        """Offers of values and latents (B, m) in any order; equal values keep theirs."""
        order = values.argsort(dim=1, descending=True, stable=True)
        return cls(values.gather(1, order), indices.gather(1, order))

    def filled_up(self, width: int) -> Offers:
        """With -inf, so that there are `width` of each token."""
        missing = (0, width - self.values.shape[1])
        return Offers(F.pad(self.values, missing, value=-torch.inf), F.pad(self.indices, missing))


@functools.cache
def first_offer(k: int, n_shards: int, factor: float | None = None) -> int:
    """How many latents of a token each shard offers first: factor · k / n_shards, at least k / n_shards, at most k.

    Without a factor, so many that at most `SATURATED_AT_MOST` of the tokens are expected to need more.
    """
    least = math.ceil(k / n_shards)
    if factor is not None:
        return min(k, max(math.ceil(factor * k / n_shards), least))
    enough = (first for first in range(least, k) if expected_saturation(k, n_shards, first) <= SATURATED_AT_MOST)
    return next(enough, k)


def expected_saturation(k: int, n_shards: int, first: int) -> float:
    """Share of tokens of which some shard holds at least `first` of the k best, where latents lie on shards at random.

    At most n_shards times the chance for one shard, which is that of a binomial count (k draws, 1 / n_shards each).
    """
    if n_shards == 1:
        return float(first <= k)
    chance = 1 / n_shards
    more = 0.0
    for count in range(first, k + 1):
        ways = math.lgamma(k + 1) - math.lgamma(count + 1) - math.lgamma(k - count + 1)
        more += math.exp(ways + count * math.log(chance) + (k - count) * math.log1p(-chance))
    return min(1.0, n_shards * more)


def choose_over_shards(
    offers: Offers, k: int, communicator: Communicator, *, first: int, complete: bool = True
) -> tuple[Tensor, Tensor]:
    """Which of this shard's offers are among the k largest of all, bool (B, m), and which tokens were saturated, (B,).

    `offers` (B, m) has the same m on every shard, min(k, most latents of a shard) or more; a shard that has fewer fills
    up with -inf, which is never kept. What is kept of a row is always its beginning. Of equal values those of lower
    shards are kept, and there the first offered. All shards call this together.

    Args:
        first: how many latents of a token each shard offers before it is known which tokens need more.
        complete: offer the rest for the saturated tokens; False: keep the k largest of the first offers.

    Raises:
        ValueError: the shards' first offers are together fewer than k.
    """
    width = offers.values.shape[1]
    first = min(first, width)
    if communicator.n_shards * first < k:
        raise ValueError(f"{communicator.n_shards} shards that offer {first} latents each cannot fill k = {k}")
    gathered = communicator.gather_over_shards(offers.values[:, :first].contiguous())  # (S, B, first)
    keep, threshold = _keep(gathered, k, communicator.shard_rank)
    keep = F.pad(keep, (0, width - first))
    # Every shard has the same offers in hand, so all come to the same tokens without asking.
    last = gathered[:, :, -1]
    saturated = ((last >= threshold) & (last > -torch.inf)).any(0)
    if first == width:
        saturated = torch.zeros_like(saturated)
    elif complete:
        rows = saturated.nonzero().flatten()
        if len(rows):
            rest = communicator.gather_over_shards(offers.values[rows, first:].contiguous())
            keep[rows] = _keep(torch.cat([gathered[:, rows], rest], dim=2), k, communicator.shard_rank)[0]
    return keep, saturated


def _keep(gathered: Tensor, k: int, shard: int) -> tuple[Tensor, Tensor]:
    """Which of one shard's offers, of (S, B, m), are among the k largest (bool (B, m)), and the k-th largest (B,)."""
    n_shards, n_rows, m = gathered.shape
    all_offers = gathered.transpose(0, 1).reshape(n_rows, n_shards * m)
    threshold = torch.topk(all_offers, k, dim=1, sorted=False).values.amin(1)
    above, equal = gathered > threshold[:, None], gathered == threshold[:, None]
    left = k - above.sum((0, 2)) - equal[:shard].sum((0, 2))  # (B,): room for this shard's offers of the k-th value
    keep = above[shard] | (equal[shard] & (equal[shard].cumsum(1) <= left[:, None]))
    return keep & (gathered[shard] > -torch.inf), threshold
