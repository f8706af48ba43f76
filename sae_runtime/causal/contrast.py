"""Features that tell two sets of texts apart.

Every text becomes one row: the largest or the mean activation of each feature over its tokens. A feature's rows in the
two sets are compared by

    effect size   (mean_a - mean_b) / pooled standard deviation                        (Cohen's d)
    AUC           P(a > b) + P(a = b) / 2 for a text of each set                        (U / (n_a n_b), Mann-Whitney)
    p             two-sided, normal approximation of U with tie and continuity corrections
    q             the smallest false discovery rate at which the feature passes         (Benjamini and Hochberg 1995)

Only features that are active in at least one text are tested. The others cannot differ, and leaving them out does not
depend on which set a text belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sae_runtime.causal.correlation import ties
from sae_runtime.causal.report import FeatureContrast, FeatureId
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens

TextAggregation = Literal["max", "mean"]
MIN_TEXTS = 2
"""Texts that each set needs at least: a variance needs two."""
_COLUMNS = 4_096


@dataclass(frozen=True, eq=False)
class ContrastStatistics:
    """Per feature, float64 [m]."""

    mean_a: Tensor
    mean_b: Tensor
    effect_size: Tensor
    auc: Tensor
    p_value: Tensor


def contrast_columns(a: Tensor, b: Tensor) -> ContrastStatistics:
    """Statistics of every column of a [n_a, m] against the same column of b [n_b, m].

    Raises:
        ValueError: a set of fewer than two rows.
    """
    if len(a) < MIN_TEXTS or len(b) < MIN_TEXTS:
        raise ValueError(f"the sets have {len(a)} and {len(b)} texts, expected at least {MIN_TEXTS} each")
    tiles = [_contrast(x.double(), y.double()) for x, y in zip(a.split(_COLUMNS, 1), b.split(_COLUMNS, 1), strict=True)]
    names = ContrastStatistics.__dataclass_fields__
    return ContrastStatistics(**{name: torch.cat([getattr(tile, name) for tile in tiles]) for name in names})


def _contrast(a: Tensor, b: Tensor) -> ContrastStatistics:
    n_a, n_b = len(a), len(b)
    mean_a, mean_b = a.mean(0), b.mean(0)
    pooled = (((n_a - 1) * a.var(0) + (n_b - 1) * b.var(0)) / (n_a + n_b - 2)).sqrt()
    effect = torch.where(pooled > 0, (mean_a - mean_b) / pooled.clamp_min(1e-300), 0.0)
    below, not_above = ties(torch.cat([a, b]))
    rank_sum = (below[:n_a] + not_above[:n_a] + 1).double().sum(0) / 2
    u = rank_sum - n_a * (n_a + 1) / 2
    n = n_a + n_b
    # Each of t equal values adds t^2 - 1, together t^3 - t.
    tied = ((not_above - below).double().square() - 1).sum(0)
    variance = n_a * n_b / 12 * ((n + 1) - tied / (n * (n - 1)))
    distance = ((u - n_a * n_b / 2).abs() - 0.5).clamp_min(0)
    z = torch.where(variance > 0, distance / variance.clamp_min(1e-300).sqrt(), 0.0)
    return ContrastStatistics(mean_a, mean_b, effect, u / (n_a * n_b), torch.special.erfc(z / math.sqrt(2)))


def false_discovery_rates(p: Tensor) -> Tensor:
    """q-values [m] of p-values [m]: q of the i-th smallest is min over j >= i of p_j m / j, at most 1."""
    m = len(p)
    order = p.argsort(stable=True)
    scaled = p[order].double() * m / torch.arange(1, m + 1, dtype=torch.float64, device=p.device)
    q = torch.empty(m, dtype=torch.float64, device=p.device)
    q[order] = scaled.flip(0).cummin(0).values.flip(0).clamp_max(1)
    return q


def contrast_features(
    sets: Mapping[str, tuple[Tensor, Tensor, Tensor]],
) -> list[FeatureContrast]:
    """All tested features, the surest first: by p-value, then by size of the effect.

    False discoveries are controlled over all dictionaries together.

    Args:
        sets: by dictionary, the latents tested int64 [m], and their aggregated activations in the texts of a [n_a, m]
            and of b [n_b, m].
    """
    rows: list[tuple[FeatureId, float, float, int, int, float, float, float]] = []
    for name, (latents, a, b) in sets.items():
        statistics = contrast_columns(a, b)
        columns = zip(
            latents.tolist(),
            statistics.mean_a.tolist(),
            statistics.mean_b.tolist(),
            (a != 0).sum(0).tolist(),
            (b != 0).sum(0).tolist(),
            statistics.effect_size.tolist(),
            statistics.auc.tolist(),
            statistics.p_value.tolist(),
            strict=True,
        )
        rows += [(FeatureId(name, latent), *figures) for latent, *figures in columns]
    if not rows:
        return []
    q = false_discovery_rates(torch.tensor([row[-1] for row in rows], dtype=torch.float64)).tolist()
    contrasts = [FeatureContrast(*row, q_value) for row, q_value in zip(rows, q, strict=True)]
    return sorted(contrasts, key=lambda contrast: (contrast.p_value, -abs(contrast.effect_size)))


@torch.no_grad()
def aggregate_texts(
    backbone: Backbone,
    dictionaries: Mapping[str, Dictionary],
    rows: Sequence[Sequence[int]],
    aggregation: TextAggregation,
    *,
    tokens_per_pass: int = 4_096,
) -> dict[str, Tensor]:
    """Each text's aggregated activations as a row: float32 [n, n_latents] on the host, by dictionary.

    A latent counts as 0 on tokens where it is silent.
    """
    sites = {name: dictionary.require_site() for name, dictionary in dictionaries.items()}
    results = {name: torch.zeros(len(rows), dictionary.n_latents) for name, dictionary in dictionaries.items()}
    for batch in _batches(rows, tokens_per_pass):
        packed = PackedTokens.from_rows([rows[i] for i in batch]).to(backbone.device)
        activations = backbone.forward(packed, capture=set(sites.values())).activations
        row = torch.tensor(list(batch))[packed.row_of_token.cpu()]
        for name, dictionary in dictionaries.items():
            features = dictionary.encode(activations[sites[name]])
            indices, values = features.indices.cpu(), features.values.float().cpu()
            flat = (row[:, None] * dictionary.n_latents + indices.clamp_min(0)).flatten()
            target = results[name].view(-1)
            if aggregation == "max":
                target.scatter_reduce_(0, flat, values.flatten(), "amax")
            else:
                share = values / torch.tensor(packed.lengths)[packed.row_of_token.cpu()][:, None]
                target.index_add_(0, flat, share.flatten())
    return results


def active_columns(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns that are active in a text of a [n_a, m] or b [n_b, m], int64, and both sets with these alone."""
    active = ((a != 0).any(0) | (b != 0).any(0)).nonzero().squeeze(1)
    return active, a[:, active], b[:, active]


def _batches(rows: Sequence[Sequence[int]], tokens: int) -> list[range]:
    batches, start, size = [], 0, 0
    for i, row in enumerate(rows):
        if i > start and size + len(row) > tokens:
            batches.append(range(start, i))
            start, size = i, 0
        size += len(row)
    return [*batches, range(start, len(rows))]
