"""The tables of STUDY.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sae_runtime.builtin.study.measure import CANDIDATES, Study
from sae_runtime.builtin.study.texts import QUESTIONS, Halves, Question, Row
from sae_runtime.causal.report import FeatureContrast

TEXTS_TO_CHOOSE = 40
"""Most texts of a set used to choose the feature with the largest effect and the strengths of edits."""
TOGETHER = 8
"""Number of features that a joint edit sets."""


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table_head(*columns: str) -> list[str]:
    """The first two rows of a Markdown table."""
    return [table_row(columns), table_row(["---"] * len(columns))]


def tables(study: Study) -> str:
    """All tables of the study, as Markdown."""
    features = table_head(
        "kind", "set a", "set b", "texts", "at q ≤ 0.05", "chosen", "feature", "AUC", "effect size", "example"
    )
    ablated = table_head(
        "feature", "texts", "active on", "Δ loss, nats a token", "Δ loss where active", "KL where active"
    )
    reach = table_head("feature", "0", "1", "2", "3-4", "5-8", "9-16", "17-32")
    edited = table_head("kind", "features set on all tokens", "Δ loss on a", "Δ loss on b", "favours a by")
    for question in QUESTIONS:
        case = _Case.of(study, question)
        for how, contrast in case.chosen(study).items():
            features.append(case.feature_row(study, how, contrast))
            for row, reach_row in case.ablation_rows(study, contrast):
                ablated.append(row)
                reach += reach_row
        edited += [case.edit_row(study, n_features) for n_features in (1, TOGETHER)]
    n, pearson, spearman = study.attributions(40)
    return "\n".join(
        [
            "### Features found",
            "",
            *features,
            "",
            "### Ablated to zero, on the other half",
            "",
            *ablated,
            "",
            "### KL by distance behind the strongest token of each text of a, which alone is changed",
            "",
            *reach,
            "",
            "### Set on all tokens, on the other half",
            "",
            *edited,
            "",
            "### Attribution against exact ablation",
            "",
            f"Next tokens of {n} texts of all kinds, the 20 largest attributions of each over all dictionaries: median "
            f"Pearson {pearson:.3f}, median Spearman {spearman:.3f}.",
        ]
    )


@dataclass(frozen=True)
class _Case:
    """A question with its texts, and the features that tell its sets apart, the surest first."""

    question: Question
    a: Halves
    b: Halves
    others: list[Row]
    contrasts: list[FeatureContrast]

    @classmethod
    def of(cls, study: Study, question: Question) -> _Case:
        a = study.texts.halves(question.belongs_to_a, question.pieces, question.piece_in_a)
        b = study.texts.halves(question.belongs_to_b, question.pieces, question.piece_in_b)
        others = study.texts.others(question.belongs_to_a, question.belongs_to_b)
        return cls(question, a, b, others, study.contrast(a.find, b.find))

    @property
    def towards_a(self) -> list[FeatureContrast]:
        return [contrast for contrast in self.contrasts if contrast.auc > 0.5]

    def chosen(self, study: Study) -> dict[str, FeatureContrast]:
        """The features looked at, by how they were chosen."""
        most_causal = study.most_causal(self.contrasts, self.a.find[:TEXTS_TO_CHOOSE])
        return {"surest": self.towards_a[0], f"largest effect of the {CANDIDATES} surest": most_causal}

    def feature_row(self, study: Study, how: str, contrast: FeatureContrast) -> str:
        return table_row(
            [
                self.question.kind,
                self.question.a,
                self.question.b,
                f"{len(self.a.find)} + {len(self.b.find)}",
                f"{sum(other.q_value <= 0.05 for other in self.contrasts)}",
                how,
                _name(contrast),
                f"{contrast.auc:.3f}",
                f"{contrast.effect_size:.2f}",
                f"`{study.example(contrast.feature, self.a.measure)}`",
            ]
        )

    def ablation_rows(self, study: Study, contrast: FeatureContrast) -> Iterator[tuple[str, list[str]]]:
        """The ablation row of each set of texts; for set a also the reach row."""
        named = f"{self.question.kind}, {_name(contrast)}"
        for title, rows in (("a", self.a.measure), ("b", self.b.measure), ("other kinds", self.others)):
            effect = study.ablate(contrast.feature, rows)
            row = table_row(
                [
                    named,
                    f"{title} ({len(rows)})",
                    f"{effect.active_tokens / effect.everywhere.n_tokens:.2%}",
                    _interval(effect.everywhere.delta_loss, effect.delta_loss_interval),
                    f"{effect.at_active.delta_loss:+.4f}" if effect.active_tokens else "",
                    f"{effect.at_active.kl:.4f}" if effect.active_tokens else "",
                ]
            )
            by_first = {distance.first: distance.figures.kl for distance in effect.by_distance}
            distances = [by_first.get(first) for first in (0, 1, 2, 3, 5, 9, 17)]
            reach = table_row([named, *("" if kl is None else f"{kl:.4f}" for kl in distances)])
            yield row, [reach] if title == "a" else []

    def edit_row(self, study: Study, n_features: int) -> str:
        edits, factor = study.suggestion(
            self.towards_a[:n_features], self.a.find[:TEXTS_TO_CHOOSE], self.b.find[:TEXTS_TO_CHOOSE]
        )
        on_a, on_b = study.edited(edits, self.a.measure), study.edited(edits, self.b.measure)
        which = "the surest" if n_features == 1 else f"the {n_features} surest"
        return table_row(
            [
                self.question.kind,
                f"{which}, at {factor:g} × their typical peak in a",
                _interval(on_a.delta_loss, on_a.interval),
                _interval(on_b.delta_loss, on_b.interval),
                f"{on_b.delta_loss - on_a.delta_loss:+.4f}",
            ]
        )


def _name(contrast: FeatureContrast) -> str:
    return f"`{contrast.feature.dictionary}:{contrast.feature.feature}`"


def _interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"
