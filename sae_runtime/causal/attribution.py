"""Which features on which tokens drive a logit: gradient x activation, checked by exact ablation.

The metric is a logit, or the difference of two, after one token. A feature with activation z on a token enters the
forward pass as h + std z d, so that

    dm/dz = std (dm/dh . d),        attribution = z dm/dz

where dm/dh at every site comes from one backward pass. The attribution is the first-order estimate of how far the
metric falls when the feature is set to zero there: m(unedited) - m(ablated), which `AttributionStudy.run` measures.
(Attribution patching: Nanda 2023; Syed, Rager and Conmy 2023. For latents: Marks et al. 2024.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.causal.correlation import pearson, spearman
from sae_runtime.causal.prefix import Change, SharedPrefix, last_site
from sae_runtime.causal.report import Attribution, AttributionReport, FeatureAttribution, FeatureId
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.dictionary.ranking import Ranking, ranking_table
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site

_ENTRIES = 1 << 22
"""Entries of gathered decoder rows that exist at once."""


@dataclass(frozen=True)
class Target:
    """The metric to explain: logit(token), or logit(token) - logit(foil), after the last token of a row."""

    token: int
    foil: int | None = None


class AttributionStudy:
    """The attributions of one row from its gradients, and exact ablations that check them.

    The gradients need autograd, so the constructor leaves torch.inference_mode while it computes.
    """

    def __init__(
        self,
        backbone: Backbone,
        dictionaries: Mapping[str, Dictionary],
        row: Sequence[int],
        target: Target,
        *,
        count: int = 20,
        rank_by: Ranking = "activation",
    ) -> None:
        """One forward and one backward pass.

        Args:
            dictionaries: with a site; by name.
            row: tokens up to the one after which the target is predicted.
            count: number of (feature, token) pairs kept, those with the largest attributions in size.
            rank_by: with "surprise", sizes are multiplied by -log10 of the feature's firing rate; with "z_score", they
                are divided by its deviation.

        Raises:
            ValueError: activations or logits that are not finite, or a dictionary without statistics to rank by.
        """
        self._backbone, self._target = backbone, target
        self._dictionaries = dictionaries
        self._sites = {name: dictionary.require_site() for name, dictionary in dictionaries.items()}
        with torch.inference_mode(False), torch.no_grad():
            self._prefix = SharedPrefix(backbone, [list(row)], set(self._sites.values()))
            self.metric = float(self._metric(self._prefix.final[-1:]))
            gradients = self._gradients()
            self._scale: dict[str, Tensor | None] = {}
            pairs: list[tuple[float, Attribution]] = []
            self.totals: dict[str, float] = {}
            self.n_active = 0
            for name, dictionary in dictionaries.items():
                site = self._sites[name]
                features = dictionary.encode(self._prefix.paused[site].activation)
                statistics = features.input_statistics
                self._scale[name] = None if statistics is None else statistics.std
                gradient = latent_gradients(dictionary, features, gradients[site])
                attribution = features.values.to(gradient.dtype) * gradient  # [T, k]
                self.totals[name] = float(attribution.sum(dtype=torch.float64))
                self.n_active += int((features.values != 0).sum())
                size = attribution.abs()
                if rank_by != "activation":
                    scale = torch.from_numpy(ranking_table(dictionary.statistics, rank_by).scale).to(size)
                    size = size * scale[features.indices]  # the padding's -1 reads the last latent, and stays out
                pairs += _largest(name, features, gradient, attribution, size, count)
        pairs.sort(key=lambda pair: -pair[0])
        self.attributions = tuple(attribution for _, attribution in pairs[:count])

    @property
    def length(self) -> int:
        """Tokens of the row: what one ablation costs."""
        return len(self._prefix.packed)

    @torch.no_grad()
    def run(self, attributions: Sequence[Attribution]) -> list[FeatureAttribution]:
        """The attributions with their exact effects, in the same order; one batch runs for each site.

        Raises:
            ValueError: activations out of the range of the backbone's dtype.
        """
        by_site: dict[Site, list[int]] = {}
        for i, pair in enumerate(attributions):
            by_site.setdefault(self._sites[pair.feature.dictionary], []).append(i)
        effects: dict[int, float] = {}
        for site, indices in by_site.items():
            changed = self._prefix.run(site, [self._ablation(attributions[i]) for i in indices])
            at_last = changed.source == self.length - 1
            metric = self._metric(changed.final[at_last])
            for change, value in zip(changed.change[at_last].tolist(), metric.tolist(), strict=True):
                effects[indices[change]] = self.metric - value
        return [
            FeatureAttribution(
                pair.feature, pair.position, pair.activation, pair.gradient, pair.attribution, effects[i]
            )
            for i, pair in enumerate(attributions)
        ]

    def report(self, attributions: Sequence[FeatureAttribution]) -> AttributionReport:
        """The report on the attributions that `run` returned."""
        estimate = torch.tensor([pair.attribution for pair in attributions], dtype=torch.float64)
        effect = torch.tensor([pair.effect for pair in attributions], dtype=torch.float64)
        return AttributionReport(
            metric=self.metric,
            attributions=tuple(attributions),
            n_active=self.n_active,
            totals=self.totals,
            pearson=pearson(estimate, effect),
            spearman=spearman(estimate, effect),
        )

    def _metric(self, final: Tensor) -> Tensor:
        """m [n] from the last block's output at the row's last token, [n, d_model]."""
        logits = self._backbone.unembed(final)
        if not bool(logits.isfinite().all()):
            raise ValueError("the logits are not finite")
        metric = logits[:, self._target.token]
        return metric if self._target.foil is None else metric - logits[:, self._target.foil]

    def _gradients(self) -> dict[Site, Tensor]:
        """dm/dh [T, width] of every site, from one backward pass that starts at the first of them."""
        leaves: dict[Site, Tensor] = {}

        def add_leaf(site: Site, x: Tensor) -> Tensor:
            leaves[site] = torch.zeros_like(x, requires_grad=True)
            return x + leaves[site]

        sites = sorted(set(self._sites.values()))
        packed = PackedTokens(self._prefix.packed.ids, self._prefix.packed.lengths, (0,))
        last = last_site(self._backbone)
        with torch.enable_grad():
            result = self._backbone.forward(
                packed, start=self._prefix.paused[sites[0]], edit=add_leaf, edit_sites=sites, capture=[last]
            )
            self._metric(result.activations[last][-1:]).sum().backward()
        gradients: dict[Site, Tensor] = {}
        for site, leaf in leaves.items():
            # autograd leaves None where the metric does not depend on the leaf.
            gradients[site] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return gradients

    def _ablation(self, pair: Attribution) -> Change:
        """h' - h = -std z d on the pair's token."""
        dictionary = self._dictionaries[pair.feature.dictionary]
        direction = dictionary.decoder[pair.feature.feature]
        dtype = torch.promote_types(direction.dtype, torch.float32)
        scale = self._scale[pair.feature.dictionary]
        amount = torch.tensor([[-pair.activation]], dtype=dtype, device=direction.device)
        if scale is not None:
            amount = amount * scale[pair.position]
        return Change(0, torch.tensor([pair.position], device=direction.device), amount * direction.to(dtype))


def latent_gradients(dictionary: Dictionary, features: SparseFeatures, gradient: Tensor) -> Tensor:
    """dm/dz of listed latents, [n, k], from dm/dh [n, width]; float32 or better, 0 at the padding."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    result = torch.zeros(features.indices.shape, dtype=dtype, device=gradient.device)
    step = max(1, _ENTRIES // max(features.indices.shape[1] * gradient.shape[1], 1))
    for start in range(0, len(features), step):
        at = slice(start, start + step)
        directions = dictionary.decoder[features.indices[at].clamp_min(0)].to(dtype)  # [n, k, width]
        result[at] = torch.einsum("nkd,nd->nk", directions, gradient[at].to(dtype))
    if features.input_statistics is not None:
        result *= features.input_statistics.std.to(dtype)
    return result * (features.indices >= 0)


def _largest(
    name: str, features: SparseFeatures, gradient: Tensor, attribution: Tensor, size: Tensor, count: int
) -> list[tuple[float, Attribution]]:
    """The `count` of a dictionary's attributions [T, k] that are largest in `size`, with it; padding is left out."""
    listed = features.indices.flatten() >= 0
    size = size.flatten().masked_fill(~listed, -1)
    k = features.indices.shape[1]
    largest = size.topk(min(count, int(listed.sum()))).indices  # into [T * k]
    return [
        (
            float(rank),
            Attribution(FeatureId(name, int(latent)), int(index) // k, float(value), float(slope), float(product)),
        )
        for rank, index, latent, value, slope, product in zip(
            size[largest].tolist(),
            largest.tolist(),
            features.indices.flatten()[largest].tolist(),
            features.values.flatten()[largest].tolist(),
            gradient.flatten()[largest].tolist(),
            attribution.flatten()[largest].tolist(),
            strict=True,
        )
    ]
