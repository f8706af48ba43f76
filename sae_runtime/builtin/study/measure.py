"""The measurements of the study: features that tell two sets apart, what their ablation and their edits do."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from sae_runtime.builtin.study.texts import Row, Texts
from sae_runtime.causal.ablation import (
    AblationStudy,
    in_batches,
)
from sae_runtime.causal.ablation_summary import StudyResult, summarize
from sae_runtime.causal.attribution import AttributionStudy, Target
from sae_runtime.causal.contrast import active_columns, aggregate_texts, contrast_features
from sae_runtime.causal.report import FeatureContrast, FeatureEffect, FeatureId, SetScore
from sae_runtime.causal.score import ScoredRow, score_rows
from sae_runtime.causal.suggestion import STRENGTH_FACTORS, at_strength, set_score, suggest_edit
from sae_runtime.dictionary.formats import list_builtin_dictionaries, load_dictionary
from sae_runtime.edits import Edit
from sae_runtime.model.backbone import Backbone

TOKENS_PER_BATCH = 4_096
"""Tokens of the ablation variants that go through the model together."""
CANDIDATES = 24
"""Number of surest features among which the one with the largest effect is chosen."""


class Study:
    """The builtin model, its dictionaries and its texts, and what is measured with them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.backbone = Backbone.load("builtin")
        self.dictionaries = {name: load_dictionary(name) for name in list_builtin_dictionaries()}
        self.texts = Texts(self.backbone, seed)

    def contrast(self, a: Sequence[Row], b: Sequence[Row]) -> list[FeatureContrast]:
        of_a = aggregate_texts(self.backbone, self.dictionaries, a, "max")
        of_b = aggregate_texts(self.backbone, self.dictionaries, b, "max")
        return contrast_features({name: active_columns(of_a[name], of_b[name]) for name in self.dictionaries})

    def ablate(self, feature: FeatureId, rows: Sequence[Row]) -> FeatureEffect:
        study = AblationStudy(self.backbone, self.dictionaries, rows, [feature], single_tokens=1)
        effects = [e for batch in in_batches(study.variants, TOKENS_PER_BATCH) for e in study.run(batch)]
        return summarize([feature], ["zero"], [StudyResult.of(study, effects)], seed=self.seed).effects[0]

    def edited(self, edits: Sequence[Edit], rows: Sequence[Row]) -> SetScore:
        losses = []
        for start in range(0, len(rows), 32):
            batch = [ScoredRow(row, edits) for row in rows[start : start + 32]]
            for score in score_rows(self.backbone, batch, self.dictionaries):
                assert score.edited is not None
                assert score.kl is not None
                change = float((score.edited.loss - score.unedited.loss).double().sum())
                losses.append((change, float(score.kl.double().sum()), len(score.kl) - 1, len(score.kl)))
        return set_score(losses, self.seed)

    def most_causal(self, contrasts: Sequence[FeatureContrast], a: Sequence[Row]) -> FeatureContrast:
        """The feature whose ablation raises the loss on a most, among its surest features, on the finding half."""
        surest = [c for c in contrasts if c.auc > 0.5 and c.q_value <= 0.05][:CANDIDATES]
        features = [contrast.feature for contrast in surest]
        study = AblationStudy(self.backbone, self.dictionaries, a, features)
        effects = [e for batch in in_batches(study.variants, TOKENS_PER_BATCH) for e in study.run(batch)]
        report = summarize(features, ["zero"], [StudyResult.of(study, effects)])
        best = max(report.effects, key=lambda effect: effect.everywhere.delta_loss).feature
        return next(contrast for contrast in surest if contrast.feature == best)

    def suggestion(
        self, contrasts: Sequence[FeatureContrast], a: Sequence[Row], b: Sequence[Row]
    ) -> tuple[tuple[Edit, ...], float]:
        """An edit towards a, and its strength: of those that are tried the one that favours a most, on this half."""
        peaks = aggregate_texts(self.backbone, self.dictionaries, a, "max")
        full = []
        for contrast in contrasts:
            feature = contrast.feature
            statistics = self.dictionaries[feature.dictionary].statistics
            assert statistics is not None
            peaks_of_feature = peaks[feature.dictionary][:, feature.feature].tolist()
            full.append(suggest_edit(contrast, peaks_of_feature, float(statistics.max[feature.feature])))
        tried = {factor: at_strength(full, factor) for factor in STRENGTH_FACTORS}

        def shift(factor: float) -> float:
            return self.edited(tried[factor], b).delta_loss - self.edited(tried[factor], a).delta_loss

        best = max(tried, key=shift)
        return tried[best], best

    def example(self, feature: FeatureId, rows: Sequence[Row]) -> str:
        """The tokens around the strongest activation, with its token in brackets."""
        dictionary = self.dictionaries[feature.dictionary]
        best = (0.0, "")
        for row in rows:
            x = self.backbone.activations(torch.tensor([row]), sites=[str(dictionary.site)])[str(dictionary.site)][0]
            z = dictionary.encode_features(x, torch.tensor([feature.feature]))[:, 0]
            value, at = (float(z.max()), int(z.argmax()))
            if value > best[0]:
                before, token, after = row[max(0, at - 8) : at], row[at : at + 1], row[at + 1 : at + 5]
                before_text, token_text, after_text = map(self.backbone.text_tokenizer.decode, (before, token, after))
                best = (value, f"{before_text}[{token_text}]{after_text}")
        return best[1].replace("\n", "⏎").replace("|", "\\|").replace("`", "'")

    def attributions(self, n: int) -> tuple[int, float, float]:
        """Over the last tokens of n texts: how many had a correlation, and the medians of Pearson and Spearman."""
        rows = self.texts.others()[:n]
        correlations = []
        for row in rows:
            study = AttributionStudy(self.backbone, self.dictionaries, row[:-1], Target(row[-1]), count=20)
            report = study.report(study.run(study.attributions))
            if report.pearson is not None and report.spearman is not None:
                correlations.append((report.pearson, report.spearman))
        return len(correlations), median(p for p, _ in correlations), median(s for _, s in correlations)
