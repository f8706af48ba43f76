"""Next-token predictions, and how a change of the activations changes them. The LM head runs in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.model.backbone import Backbone

LOGIT_ENTRIES = 1 << 24
"""Logits that exist at once (64 MiB in float32); a few temporaries of the same size come beside them."""
CACHED_ENTRIES = 1 << 19
"""Logits that are compared at once: what is computed on the way stays in the CPU's cache."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the model expects after each of P tokens."""

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
        """The same with some of the chosen tokens, by their columns."""
        return Predictions(self.loss, self.correct, self.target_logit, self.token_logits[:, columns])


def next_tokens(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [N]: the token that follows each token of the packed rows, -1 after a row's last."""
    return torch.tensor([token for row in rows for token in (*row[1:], -1)])


def predict(backbone: Backbone, final: Tensor, targets: Tensor, tokens: Tensor) -> Predictions:
    """Predictions from what the last block returned.

    Args:
        final: [P, d_model].
        targets: int64 [P], the token that follows, -1 where none does.
        tokens: int64 [m], the chosen tokens.

    Raises:
        ValueError: logits that are not finite.
    """
    parts = [
        _figures(backbone.unembed(final[at]), targets[at], tokens)
        for at in _tiles(len(final), backbone.vocab_size, LOGIT_ENTRIES)
    ]
    return _join(parts, len(tokens))


def compare(
    backbone: Backbone, final: Tensor, changed: Tensor, base: Tensor, targets: Tensor, tokens: Tensor
) -> tuple[Predictions, Tensor]:
    """Predictions of changed tokens, and KL(unchanged || changed) of each.

    Args:
        final: [P, d_model], what the last block returned for the unchanged tokens.
        changed: [E, d_model], the same for changed copies of them.
        base: int64 [E], which unchanged token each is a copy of.
        targets: int64 [P] as in `predict`.
        tokens: int64 [m], the chosen tokens.

    Returns:
        Predictions [E], and KL [E] in nats.

    Raises:
        ValueError: logits that are not finite.
    """
    order = base.argsort(stable=True)  # copies of a token stand together, which saves its own logits
    kl = torch.empty(len(base), dtype=torch.float64 if final.dtype == torch.float64 else torch.float32).to(base.device)
    parts = []
    for at in _tiles(len(base), 2 * backbone.vocab_size, LOGIT_ENTRIES):
        place = order[at]
        own, copy_of = torch.unique_consecutive(base[place], return_inverse=True)
        reference = backbone.unembed(final[own]).log_softmax(-1)
        logits = backbone.unembed(changed[place])
        for few in _tiles(len(place), backbone.vocab_size, CACHED_ENTRIES):
            parts.append(_figures(logits[few], targets[base[place[few]]], tokens))
            kl[place[few]] = divergence(reference, logits[few].log_softmax(-1), copy_of[few])
    joined = _join(parts, len(tokens))
    back = order.argsort()
    return joined[back], kl


def divergence(reference: Tensor, changed: Tensor, copy_of: Tensor) -> Tensor:
    """KL(reference || changed) in nats of log-probabilities [P, vocab] and [E, vocab]; row e's reference is copy_of[e].

    Summed as p (r - 1 + exp(-r)) with r = log p - log q: no term is negative, and small divergences keep their digits,
    which sum p r loses in float32 (the terms -p + q that are added sum to 0).
    """
    r = reference[copy_of] - changed
    p = reference.exp()[copy_of]
    near = p * (r + torch.expm1(-r.clamp(-1, 1)))
    far = p * r - p + changed.exp()
    return torch.where(r.abs() < 1, near, far).sum(-1)


def _figures(logits: Tensor, targets: Tensor, tokens: Tensor) -> Predictions:
    if not bool(logits.isfinite().all()):
        raise ValueError("the logits are not finite")
    known = targets >= 0
    target_logit = logits.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
    loss = logits.logsumexp(-1) - target_logit
    return Predictions(
        loss=loss * known,
        correct=(logits.argmax(-1) == targets) & known,
        target_logit=target_logit * known,
        token_logits=logits[:, tokens],
    )


def _join(parts: list[Predictions], n_tokens: int) -> Predictions:
    if not parts:
        none = torch.zeros(0)
        return Predictions(none, none.bool(), none, none.reshape(0, n_tokens))
    return Predictions(
        torch.cat([part.loss for part in parts]),
        torch.cat([part.correct for part in parts]),
        torch.cat([part.target_logit for part in parts]),
        torch.cat([part.token_logits for part in parts]),
    )


def _tiles(n: int, width: int, entries: int) -> list[slice]:
    step = max(1, entries // width)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
