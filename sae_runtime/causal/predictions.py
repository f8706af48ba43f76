"""Next-token predictions, and their change when activations change. The LM head runs in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.model.backbone import Backbone

LOGIT_ENTRIES = 1 << 24
"""Logits that exist at once (64 MiB in float32), beside a few temporaries of the same size."""
CACHED_ENTRIES = 1 << 19
"""Logits that are compared at once, so few that intermediate results stay in the CPU's cache."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The model's predictions after each of P tokens."""

    loss: Tensor
    """[P] nats: -log p(next token); 0 where no token follows."""
    correct: Tensor
    """bool [P]: whether the likeliest token is the one that follows."""
    target_logit: Tensor
    """[P] logit of the token that follows; 0 where none does."""
    token_logits: Tensor
    """[P, m] logits of the chosen tokens."""

    def __getitem__(self, index: slice | Tensor) -> Predictions:
        return Predictions(self.loss[index], self.correct[index], self.target_logit[index], self.token_logits[index])

    def with_tokens(self, columns: Tensor) -> Predictions:
        """The predictions with the given columns of `token_logits` only."""
        return Predictions(self.loss, self.correct, self.target_logit, self.token_logits[:, columns])


def next_tokens(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [N]: the token that follows each token of the packed rows, -1 after a row's last."""
    return torch.tensor([token for row in rows for token in (*row[1:], -1)])


def predict(backbone: Backbone, final: Tensor, targets: Tensor, tokens: Tensor) -> Predictions:
    """Predictions from the last block's output.

    Args:
        final: [P, d_model], the last block's output.
        targets: int64 [P], the token that follows, -1 where none does.
        tokens: int64 [m], the chosen tokens.

    Raises:
        ValueError: logits that are not finite.
    """
    tiles = [
        _predictions(backbone.unembed(final[tile]), targets[tile], tokens)
        for tile in _tiles(len(final), backbone.vocab_size, LOGIT_ENTRIES)
    ]
    return _join(tiles, len(tokens))


def compare(
    backbone: Backbone, final: Tensor, changed: Tensor, source: Tensor, targets: Tensor, tokens: Tensor
) -> tuple[Predictions, Tensor]:
    """Predictions of changed tokens, and KL(unchanged || changed) for each of them.

    Args:
        final: [P, d_model], the last block's output for the unchanged tokens.
        changed: [E, d_model], the same for changed copies of them.
        source: int64 [E], the unchanged token that each is a copy of.
        targets: int64 [P] as in `predict`.
        tokens: int64 [m], the chosen tokens.

    Returns:
        Predictions [E], and KL [E] in nats.

    Raises:
        ValueError: logits that are not finite.
    """
    # Copies of one token stand together in `order`, so that a tile computes its unchanged logits once.
    order = source.argsort(stable=True)
    kl_dtype = torch.float64 if final.dtype == torch.float64 else torch.float32
    kl = torch.empty(len(source), dtype=kl_dtype).to(source.device)
    predictions = []  # in `order`
    for tile in _tiles(len(source), 2 * backbone.vocab_size, LOGIT_ENTRIES):
        copies = order[tile]
        originals, original_of = torch.unique_consecutive(source[copies], return_inverse=True)
        reference = backbone.unembed(final[originals]).log_softmax(-1)
        logits = backbone.unembed(changed[copies])
        for rows in _tiles(len(copies), backbone.vocab_size, CACHED_ENTRIES):
            predictions.append(_predictions(logits[rows], targets[source[copies[rows]]], tokens))
            kl[copies[rows]] = divergence(reference, logits[rows].log_softmax(-1), original_of[rows])
    return _join(predictions, len(tokens))[order.argsort()], kl


def divergence(reference: Tensor, changed: Tensor, copy_of: Tensor) -> Tensor:
    """KL(reference || changed) in nats of log-probabilities [P, vocab] and [E, vocab]; row e's reference is copy_of[e].

    With r = log p - log q,

        KL = sum p r = sum (p r - p + q) = sum p (r - 1 + exp(-r)),

    as the p and the q sum to 1. No term of the last sum is negative, so small divergences keep their digits, which
    sum p r loses in float32.
    """
    r = reference[copy_of] - changed
    p = reference.exp()[copy_of]
    small_r = p * (r + torch.expm1(-r.clamp(-1, 1)))
    large_r = p * r - p + changed.exp()
    return torch.where(r.abs() < 1, small_r, large_r).sum(-1)


def _predictions(logits: Tensor, targets: Tensor, tokens: Tensor) -> Predictions:
    if not bool(logits.isfinite().all()):
        raise ValueError("the logits are not finite")
    has_target = targets >= 0
    target_logit = logits.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
    loss = logits.logsumexp(-1) - target_logit
    return Predictions(
        loss=loss * has_target,
        correct=(logits.argmax(-1) == targets) & has_target,
        target_logit=target_logit * has_target,
        token_logits=logits[:, tokens],
    )


def _join(tiles: list[Predictions], n_tokens: int) -> Predictions:
    if not tiles:
        empty = torch.zeros(0)
        return Predictions(empty, empty.bool(), empty, empty.reshape(0, n_tokens))
    return Predictions(
        torch.cat([tile.loss for tile in tiles]),
        torch.cat([tile.correct for tile in tiles]),
        torch.cat([tile.target_logit for tile in tiles]),
        torch.cat([tile.token_logits for tile in tiles]),
    )


def _tiles(n: int, width: int, entries: int) -> list[slice]:
    step = max(1, entries // width)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
