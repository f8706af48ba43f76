"""Ablation studies: features are removed one at a time, and the change of every prediction is measured.

A variant is a copy of one row in which one feature is ablated, to zero or to its mean, on all tokens or on one. The
unchanged rows run once. Every variant then runs only the blocks after its site, many variants in a batch. A row on
which a feature is silent does not run again: setting the feature to zero changes nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.causal.predictions import Predictions, compare, next_tokens, predict
from sae_runtime.causal.prefix import Change, SharedPrefix
from sae_runtime.causal.report import Ablation, FeatureId
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.ranking import Ranking, ranking_table
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site

DISTANCE_ENDS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1 << 31)
"""Bucket i of the distances holds [DISTANCE_ENDS[i - 1], DISTANCE_ENDS[i]): 0, 1, 2, 3 to 4, 5 to 8, ..."""

N_FIGURES = 6
"""Figures of an affected token before those of the chosen tokens: 1; whether a token follows (0 or 1); the changes of
loss, of correctness (0 or 1) and of the following token's logit; KL."""


@dataclass(frozen=True)
class Variant:
    """One changed copy of a row."""

    feature: int
    """Index into the study's list of features."""
    ablation: Ablation
    row: int
    position: int | None
    """The only token on which the feature is ablated; None for all tokens."""
    length: int
    """Tokens of the row: what the variant costs."""
    site: Site
    """The site of the feature's dictionary."""


@dataclass(frozen=True, eq=False)
class VariantEffect:
    """Sums over a variant's affected tokens. C = N_FIGURES + one logit change for each chosen token."""

    variant: Variant
    total: Tensor
    """float64 [C] on the host, all tokens."""
    active: Tensor
    """float64 [C], the tokens on which the feature is active."""
    by_distance: Tensor | None
    """float64 [len(DISTANCE_ENDS), C] by distance from the changed token; None if all tokens are changed."""


@dataclass(frozen=True, eq=False)
class FeatureActivity:
    """Where a feature is active in a study's rows."""

    active_tokens: Tensor
    """int64 [rows] on the host."""
    total: Tensor
    """float64 [rows], sum of the activations."""


class AblationStudy:
    """Rows that ran once unchanged, and the variants to run.

    `run` takes any of `variants`. Their effects do not depend on how they are batched, up to rounding.
    """

    @torch.no_grad()
    def __init__(
        self,
        backbone: Backbone,
        dictionaries: Mapping[str, Dictionary],
        rows: Sequence[Sequence[int]],
        features: Sequence[FeatureId],
        ablations: Sequence[Ablation] = ("zero",),
        *,
        tokens: Sequence[int] = (),
        single_tokens: int = 0,
    ) -> None:
        """Runs the unchanged rows, and lists the variants.

        Args:
            rows: at least two tokens each.
            features: of dictionaries with a site (and with statistics, where they are ablated to the mean).
            tokens: chosen tokens, whose logits are compared.
            single_tokens: the number of tokens in each row, those on which a feature is strongest, that are also
                changed alone. This shows how far behind a token its effect reaches.
        """
        self.backbone = backbone
        self.features = tuple(features)
        names = sorted({feature.dictionary for feature in features})
        self._site = {name: dictionaries[name].require_site() for name in names}
        self._dictionaries = {name: dictionaries[name] for name in names}
        self._prefix = SharedPrefix(backbone, rows, set(self._site.values()))
        packed = self._prefix.packed
        self.lengths = packed.lengths
        self._targets = next_tokens(rows).to(backbone.device)
        self._tokens = torch.tensor(list(tokens), dtype=torch.int64, device=backbone.device)
        self._unedited = predict(backbone, self._prefix.final, self._targets, self._tokens)
        self._activations: dict[int, Tensor] = {}  # z [N] of each feature, by its index
        self._scale: dict[str, Tensor | None] = {}  # std [N, 1] of the input rows of a normalising dictionary
        for name, dictionary in self._dictionaries.items():
            indices = [i for i, feature in enumerate(features) if feature.dictionary == name]
            latents = torch.tensor([features[i].feature for i in indices], device=dictionary.device)
            x = self._prefix.paused[self._site[name]].activation
            self._activations |= dict(zip(indices, dictionary.encode_features(x, latents).unbind(1), strict=True))
            _, statistics = dictionary.prepare(x)
            self._scale[name] = None if statistics is None else statistics.std
        self.activity = [self._activity(i) for i in range(len(features))]
        self.variants = tuple(self._variants(ablations, single_tokens))

    @property
    def unedited(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per row, float64 [rows] on the host: number of predictions with a target, sum of losses, number correct."""
        rows = self._prefix.packed.row_of_token
        figures = torch.stack([self._targets >= 0, self._unedited.loss, self._unedited.correct], dim=1).double()
        sums = torch.zeros(len(self.lengths), 3, dtype=torch.float64, device=rows.device).index_add_(0, rows, figures)
        count, loss, correct = sums.cpu().unbind(1)
        return count, loss, correct

    @torch.no_grad()
    def run(self, variants: Sequence[Variant]) -> list[VariantEffect]:
        """Runs variants, in one batch for each site. Effects are in the order of `variants`.

        Raises:
            ValueError: activations or logits out of the range of the backbone's dtype.
        """
        by_site: dict[Site, list[int]] = {}
        for i, variant in enumerate(variants):
            by_site.setdefault(variant.site, []).append(i)
        effects: dict[int, VariantEffect] = {}
        for site, indices in by_site.items():
            at_site = [variants[i] for i in indices]
            effects |= dict(zip(indices, self._run_site(site, at_site), strict=True))
        return [effects[i] for i in range(len(variants))]

    def _run_site(self, site: Site, variants: Sequence[Variant]) -> Iterator[VariantEffect]:
        changed = self._prefix.run(site, [self._change(variant) for variant in variants])
        predictions, kl = compare(
            self.backbone, self._prefix.final, changed.final, changed.source, self._targets, self._tokens
        )
        before = self._unedited[changed.source]
        figures = _figures(before, predictions, kl, self._targets[changed.source] >= 0)  # [M, C]
        activations = torch.stack([self._activations[variant.feature] for variant in variants])  # [V, N]
        active = activations[changed.change, changed.source] != 0
        total = _sum_by(changed.change, figures, len(variants))
        at_active = _sum_by(changed.change[active], figures[active], len(variants))
        # Tokens of the variants with one changed token, summed in groups of (variant, bucket of the distance).
        n_buckets = len(DISTANCE_ENDS)
        is_single = torch.tensor([variant.position is not None for variant in variants], device=kl.device)
        changed_token = torch.tensor(
            [self._prefix.starts[variant.row] + (variant.position or 0) for variant in variants], device=kl.device
        )
        single = is_single[changed.change]  # [M]
        distance = (changed.source - changed_token[changed.change])[single]
        bucket = torch.bucketize(distance, torch.tensor(DISTANCE_ENDS, device=kl.device), right=True)
        group = changed.change[single] * n_buckets + bucket
        by_distance = _sum_by(group, figures[single], len(variants) * n_buckets).view(len(variants), n_buckets, -1)
        for i, variant in enumerate(variants):
            yield VariantEffect(
                variant, total[i], at_active[i], by_distance[i] if variant.position is not None else None
            )

    def _change(self, variant: Variant) -> Change:
        """h' - h = std (z' - z) d where the feature is ablated, as in `sae_runtime.edits`."""
        feature = self.features[variant.feature]
        dictionary = self._dictionaries[feature.dictionary]
        start = self._prefix.starts[variant.row]
        z = self._activations[variant.feature][start : start + variant.length]
        new = self._mean(variant.feature) if variant.ablation == "mean" else 0.0
        if variant.position is not None:
            tokens = torch.tensor([variant.position], device=z.device)
        else:
            tokens = (z != new).nonzero().squeeze(1)
            if not len(tokens):  # z is the mean everywhere: the change is 0
                tokens = torch.zeros(1, dtype=torch.int64, device=z.device)
        dtype = torch.promote_types(z.dtype, torch.float32)
        amount = (new - z[tokens].to(dtype))[:, None]
        scale = self._scale[feature.dictionary]
        if scale is not None:
            amount = amount * scale[start + tokens]
        return Change(variant.row, tokens, amount * dictionary.decoder[feature.feature].to(dtype))

    def _activity(self, feature: int) -> FeatureActivity:
        z = self._activations[feature].split(self.lengths)
        return FeatureActivity(
            torch.stack([(row != 0).sum() for row in z]).cpu(), torch.stack([row.double().sum() for row in z]).cpu()
        )

    def _variants(self, ablations: Sequence[Ablation], single_tokens: int) -> Iterator[Variant]:
        for feature in range(len(self.features)):
            active = self.activity[feature].active_tokens.tolist()
            site = self._site[self.features[feature].dictionary]
            rows = self._activations[feature].abs().split(self.lengths)
            for row, length in enumerate(self.lengths):
                strongest = rows[row].topk(min(single_tokens, active[row])).indices.tolist() if active[row] else []
                for ablation in ablations:
                    # A mean of 0 is the same as zero: nothing changes where the feature is silent.
                    if active[row] or (ablation == "mean" and self._mean(feature) != 0):
                        yield Variant(feature, ablation, row, None, length, site)
                    yield from (Variant(feature, ablation, row, position, length, site) for position in strongest)

    def _mean(self, feature: int) -> float:
        dictionary, latent = self.features[feature]
        statistics = self._dictionaries[dictionary].statistics
        assert statistics is not None, "the caller checks that there are statistics"
        return float(statistics.mean[latent])


@torch.no_grad()
def total_activation(
    backbone: Backbone, dictionaries: Mapping[str, Dictionary], rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """How much each latent writes on the rows: the sum over tokens of |z| std |d|, where d is its decoder row.

    A summand is the length of what the latent adds to the reconstruction, so latents of dictionaries with different
    normalisations compare. Float64 [n_latents] on the host, by the dictionary's name.
    """
    sites = {name: dictionary.require_site() for name, dictionary in dictionaries.items()}
    activations = backbone.forward(PackedTokens.from_rows(rows), capture=set(sites.values())).activations
    totals = {}
    for name, dictionary in dictionaries.items():
        features = dictionary.encode(activations[sites[name]])
        total = torch.zeros(dictionary.n_latents, dtype=torch.float64, device=features.values.device)
        values = features.values.abs().double()
        if features.input_statistics is not None:
            values = values * features.input_statistics.std
        total.index_add_(0, features.indices.clamp_min(0).flatten(), values.flatten())
        active = total.nonzero().squeeze(1)
        total[active] *= dictionary.decoder[active].double().norm(dim=1)
        totals[name] = total.cpu()
    return totals


def ranked_totals(
    totals: Mapping[str, Tensor], dictionaries: Mapping[str, Dictionary], ranking: Ranking
) -> dict[str, Tensor]:
    """The totals of `total_activation` in the units of an order.

    With "surprise" they are multiplied by -log10 of the firing rate, with "z_score" divided by the deviation.
    ValueError: a dictionary lacks the statistics for that.
    """
    if ranking == "activation":
        return dict(totals)
    tables = {name: ranking_table(dictionaries[name].statistics, ranking) for name in totals}
    return {name: total * torch.from_numpy(tables[name].scale) for name, total in totals.items()}


def strongest_features(totals: Mapping[str, Tensor], count: int) -> list[FeatureId]:
    """The features with the largest totals, largest first; silent ones are left out."""
    names = sorted(totals)
    offsets = torch.tensor([0, *(len(totals[name]) for name in names)]).cumsum(0).tolist()  # in the joined totals
    values, indices = torch.cat([totals[name] for name in names]).sort(descending=True, stable=True)
    strongest = []
    for value, index in zip(values[:count].tolist(), indices[:count].tolist(), strict=True):
        if value > 0:
            i = max(i for i in range(len(names)) if offsets[i] <= index)
            strongest.append(FeatureId(names[i], index - offsets[i]))
    return strongest


def in_batches(variants: Sequence[Variant], max_tokens: int) -> list[list[Variant]]:
    """Batches of one site and at most `max_tokens` tokens, similar lengths together; a longer variant stands alone."""
    batches: list[list[Variant]] = []
    size = 0
    for variant in sorted(variants, key=lambda variant: (variant.site, variant.length, variant.row)):
        if not batches or variant.site != batches[-1][0].site or size + variant.length > max_tokens:
            batches.append([])
            size = 0
        batches[-1].append(variant)
        size += variant.length
    return batches


def _figures(before: Predictions, after: Predictions, kl: Tensor, has_target: Tensor) -> Tensor:
    """float64 [M, C]: 1, has_target, loss, correct, target logit, KL, chosen logits; changes are after - before."""
    fixed = [
        torch.ones_like(kl),
        has_target,
        after.loss - before.loss,
        after.correct.double() - before.correct.double(),
        after.target_logit - before.target_logit,
        kl,
    ]
    logits = after.token_logits.double() - before.token_logits.double()
    return torch.cat([torch.stack([figure.double() for figure in fixed], dim=1), logits], dim=1)


def _sum_by(group: Tensor, figures: Tensor, n_groups: int) -> Tensor:
    sums = torch.zeros(n_groups, figures.shape[1], dtype=torch.float64, device=figures.device)
    return sums.index_add_(0, group, figures).cpu()
