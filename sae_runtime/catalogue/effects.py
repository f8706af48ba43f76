"""What changes when a latent is taken away where it is active, and when it is set to its maximum where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_runtime.causal.predictions import compare
from sae_runtime.causal.prefix import Change, SharedPrefix
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.model.backbone import Backbone
from sae_runtime.progress import ProgressMeter

Array = npt.NDArray[Any]

_TOKENS_AT_ONCE = 1 << 13


@torch.no_grad()
def ablation_kl(
    backbone: Backbone,
    dictionary: Dictionary,
    rows: Mapping[int, Sequence[Sequence[int]]],
    progress: ProgressMeter | None = None,
) -> dict[int, float]:
    """Mean KL (nats) of the next token's distribution on the tokens where a latent is active, when it is set to zero.

    Args:
        rows: by latent, rows of at least two tokens in which it is ablated everywhere; each row is read by itself.

    Returns:
        By latent; without those that are silent in all of their rows.
    """
    site = dictionary.require_site()
    effects: dict[int, float] = {}
    done = 0
    for latents in _groups({latent: sum(map(len, of_latent)) for latent, of_latent in rows.items()}):
        owner = [i for i, latent in enumerate(latents) for _ in rows[latent]]
        prefix = SharedPrefix(backbone, [row for latent in latents for row in rows[latent]], {site})
        x = prefix.paused[site].activation
        z = _activations(dictionary, x, latents)  # [N, latents]
        z = z.gather(1, torch.tensor(owner, device=z.device)[prefix.packed.row_of_token][:, None])  # [N, 1]
        _, statistics = dictionary.prepare(x)
        amount = -z if statistics is None else -z * statistics.std
        changes, latent_of_change = [], []
        for row, (start, length) in enumerate(zip(prefix.starts, prefix.packed.lengths, strict=True)):
            active = z[start : start + length, 0].nonzero()[:, 0]
            if len(active):
                direction = dictionary.decoder[latents[owner[row]]].to(z.dtype)
                changes.append(Change(row, active, amount[start + active] * direction))
                latent_of_change.append(owner[row])
        if changes:
            changed = prefix.run(site, changes)
            active = z[changed.source, 0] != 0
            source = changed.source[active]
            nothing = torch.full((len(x),), -1, device=x.device)
            _, kl = compare(backbone, prefix.final, changed.final[active], source, nothing, nothing[:0])
            index = np.array(latent_of_change)[changed.change[active].cpu().numpy()]
            sums, counts = np.bincount(index, kl.cpu().numpy()), np.bincount(index)
            effects |= {latents[i]: float(sums[i] / counts[i]) for i in np.flatnonzero(counts)}
        done += len(latents)
        if progress is not None:
            progress.reach(done)
    return effects


@torch.no_grad()
def output_scores(
    backbone: Backbone,
    dictionary: Dictionary,
    maxima: Mapping[int, float],
    promoted: Mapping[int, Array],
    rows: Sequence[Sequence[int]],
    progress: ProgressMeter | None = None,
) -> dict[int, float]:
    """How much likelier one of its promoted tokens gets when a latent is set to its maximum, in nats.

    The latent is set on the last token of each row, and the change of log(sum of the probabilities of the promoted
    tokens) after it is averaged over the rows.

    Args:
        maxima: by latent.
        promoted: by latent, its tokens: equally many of each.
        rows: the same for all latents.
    """
    if not rows or not maxima:
        return {}
    site, device = dictionary.require_site(), backbone.device
    prefix = SharedPrefix(backbone, rows, {site})
    ends = prefix.packed.row_ends
    before = backbone.unembed(prefix.final[ends]).log_softmax(-1)  # [rows, vocab]
    x = prefix.paused[site].activation[ends]
    _, statistics = dictionary.prepare(x)
    scores: dict[int, float] = {}
    for latents in _groups(dict.fromkeys(maxima, len(prefix.packed))):
        z = _activations(dictionary, x, latents)  # [rows, latents]
        amount = torch.tensor([maxima[latent] for latent in latents], device=z.device) - z
        if statistics is not None:
            amount = amount * statistics.std
        delta = amount.T[:, :, None] * dictionary.decoder[latents].to(z.dtype)[:, None]  # [latents, rows, width]
        changes = [
            Change(row, torch.tensor([len(tokens) - 1], device=device), delta[i, row][None])
            for i in range(len(latents))
            for row, tokens in enumerate(rows)
        ]
        after = backbone.unembed(prefix.run(site, changes).final).log_softmax(-1)  # [latents * rows, vocab]
        tokens = torch.from_numpy(np.stack([promoted[latent] for latent in latents])).to(device)  # [latents, m]
        after = after.view(len(latents), len(rows), -1).gather(2, tokens[:, None].expand(-1, len(rows), -1))
        unchanged = before[None].expand(len(latents), -1, -1).gather(2, tokens[:, None].expand(-1, len(rows), -1))
        change = (after.logsumexp(-1) - unchanged.logsumexp(-1)).double().mean(1)
        scores |= dict(zip(latents, change.tolist(), strict=True))
        if progress is not None:
            progress.reach(len(scores))
    return scores


def _activations(dictionary: Dictionary, x: Tensor, latents: list[int]) -> Tensor:
    """[n, latents] for x [n, width], in float32 or better."""
    z = dictionary.encode_features(x, torch.tensor(latents, device=dictionary.device))
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _groups(sizes: Mapping[int, int]) -> list[list[int]]:
    """The keys in their order, as many in a group as have _TOKENS_AT_ONCE tokens together, but at least one."""
    groups: list[list[int]] = []
    size = 0
    for key, n in sizes.items():
        if not groups or size + n > _TOKENS_AT_ONCE:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += n
    return groups
