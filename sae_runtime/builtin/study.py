"""Measures what features of the builtin model do, and prints the tables of STUDY.md.

    python -m sae_runtime.builtin.study              # all of it: a few minutes on one core
    python -m sae_runtime.builtin.study --speed      # only the speed of the shared prefix

Everything comes from the package: the builtin model, its dictionaries and its held-out text. Documents are split in
two by a seed: features are found (and the strength of their edits is chosen) on one half, effects are measured on the
other.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from sae_runtime.builtin import HELD_OUT
from sae_runtime.causal.ablation import (
    AblationStudy,
    in_batches,
    strongest_features,
    total_activation,
)
from sae_runtime.causal.ablation_summary import StudyResult, summarize
from sae_runtime.causal.attribution import AttributionStudy, Target
from sae_runtime.causal.contrast import active_columns, aggregate_texts, contrast_features
from sae_runtime.causal.report import FeatureContrast, FeatureEffect, FeatureId, SetScore
from sae_runtime.causal.score import ScoredRow, score_rows
from sae_runtime.causal.suggestion import STRENGTH_FACTORS, at_strength, set_score, suggest_edit
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats import list_builtin_dictionaries, load_dictionary
from sae_runtime.edits import BatchEdits, BatchRow, Edit, RowEdits
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens

WINDOW = 64
"""Tokens of a text, at most."""
MOST_TEXTS = 80
"""Texts of a set, in each half."""
TOKENS_PER_BATCH = 4_096
CANDIDATES = 24
"""Features, the surest, among which the one with the largest effect is looked for."""
TEXTS_TO_CHOOSE = 40
"""Texts of a set, at most, on which that effect and the strengths of edits are looked at."""
TOGETHER = 8
"""Features that an edit of several sets."""

Row = list[int]
Belongs = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Question:
    """Two sets of texts; the features that tell them apart are what is studied."""

    kind: str
    a: str
    b: str
    belongs_to_a: Belongs
    belongs_to_b: Belongs
    pieces: Callable[[dict[str, Any]], list[str]] = lambda document: [document["text"]]
    """Texts of a document."""
    piece_in_a: Callable[[str], bool] = lambda piece: True
    piece_in_b: Callable[[str], bool] = lambda piece: True


def _sentences(document: dict[str, Any]) -> list[str]:
    return [piece for piece in re.split(r"(?<=[.;?!]) ", document["text"]) if len(piece) > 30]


def _equations(document: dict[str, Any]) -> list[str]:
    """Runs of four lines that all are equations, or that all are comparisons."""
    lines = [line for line in document["text"].split("\n") if line]
    groups = [lines[i : i + 4] for i in range(0, len(lines), 4)]
    # Short enough for one window, which then holds all four.
    return [text for group in groups if len(group) == 4 and len(text := "\n".join(group)) <= WINDOW]


def _all_lines(piece: str, has: str, lacks: str) -> bool:
    return all(re.search(has, line) and not re.search(lacks, line) for line in piece.split("\n"))


def _bible(document: dict[str, Any], *languages: str) -> bool:
    return document["kind"] == "parallel" and document["lang"] in languages


OTHER_LANGUAGES = ("de", "en", "es", "it", "nl", "pt")
QUESTIONS = (
    Question(
        "proper name",
        "English Bible sentences with the name Jesus",
        "English Bible sentences without it",
        lambda document: _bible(document, "en"),
        lambda document: _bible(document, "en"),
        _sentences,
        lambda piece: "Jesus" in piece,
        lambda piece: "Jesus" not in piece,
    ),
    Question(
        "language",
        "French Bible passages",
        "the same Bible in de, en, es, it, nl and pt",
        lambda document: _bible(document, "fr"),
        lambda document: _bible(document, *OTHER_LANGUAGES),
    ),
    Question(
        "operator",
        "four lines of equations",
        "four lines of comparisons (<, >, ≤, ≥)",
        lambda document: document["kind"] == "maths",
        lambda document: document["kind"] == "maths",
        _equations,
        lambda piece: _all_lines(piece, " = ", "[<>≤≥≈!]"),
        lambda piece: _all_lines(piece, "[<>≤≥]", "(?<![<>!])=(?!=)|≈"),
    ),
    Question(
        "topic",
        "Python code",
        "books and encyclopedia articles",
        lambda document: document["kind"] == "code",
        lambda document: document["kind"] in ("book", "wiki"),
    ),
)


@dataclass(frozen=True)
class Halves:
    """Texts to find features on, and texts to measure them on; of different documents."""

    find: list[Row]
    measure: list[Row]


class Study:
    """The builtin model and its held-out documents."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.backbone = Backbone.load("builtin")
        self.dictionaries = {name: load_dictionary(name) for name in list_builtin_dictionaries()}
        with lzma.open(HELD_OUT, "rt", encoding="utf-8") as lines:
            self.documents: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def halves(
        self, belongs: Belongs, pieces: Callable[[dict[str, Any]], list[str]], keep: Callable[[str], bool]
    ) -> Halves:
        """Windows of the documents' pieces; a document is wholly in one half, parallel texts by their passage."""
        found: dict[bool, list[Row]] = {True: [], False: []}
        for document in self.documents:
            if not belongs(document):
                continue
            # By the passage and not the document: its translations say the same.
            key = f"{self.seed}/{document.get('group', document['id'])}"
            rows = [row for piece in pieces(document) if keep(piece) for row in self._windows(piece)]
            found[random.Random(key).random() < 0.5] += rows
        for rows in found.values():
            random.Random(self.seed).shuffle(rows)
        return Halves(found[True][:MOST_TEXTS], found[False][:MOST_TEXTS])

    def _windows(self, text: str) -> list[Row]:
        ids = self.backbone.encode_text(text).ids
        rows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        return [row for row in rows if len(row) >= 8][:8]

    def others(self, *sets: Belongs) -> list[Row]:
        """Windows of documents that are in neither set."""
        apart = self.halves(
            lambda document: not any(belongs(document) for belongs in sets),
            lambda document: [document["text"]],
            lambda piece: True,
        )
        return apart.measure

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
        """Of the surest features of a the one whose ablation raises its loss most, on the finding half."""
        surest = [each for each in contrasts if each.auc > 0.5 and each.q_value <= 0.05][:CANDIDATES]
        features = [each.feature for each in surest]
        study = AblationStudy(self.backbone, self.dictionaries, a, features)
        effects = [e for batch in in_batches(study.variants, TOKENS_PER_BATCH) for e in study.run(batch)]
        report = summarize(features, ["zero"], [StudyResult.of(study, effects)])
        best = max(report.effects, key=lambda effect: effect.everywhere.delta_loss).feature
        return next(each for each in surest if each.feature == best)

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
            own = peaks[feature.dictionary][:, feature.feature].tolist()
            full.append(suggest_edit(contrast, own, float(statistics.max[feature.feature])))
        tried = {factor: at_strength(full, factor) for factor in STRENGTH_FACTORS}

        def shift(factor: float) -> float:
            return self.edited(tried[factor], b).delta_loss - self.edited(tried[factor], a).delta_loss

        best = max(tried, key=shift)
        return tried[best], best

    def example(self, feature: FeatureId, rows: Sequence[Row]) -> str:
        """The tokens around the strongest activation, that token in brackets."""
        dictionary = self.dictionaries[feature.dictionary]
        best = (0.0, "")
        for row in rows:
            x = self.backbone.activations(torch.tensor([row]), sites=[str(dictionary.site)])[str(dictionary.site)][0]
            z = dictionary.encode_features(x, torch.tensor([feature.feature]))[:, 0]
            value, at = (float(z.max()), int(z.argmax()))
            if value > best[0]:
                before, token, after = row[max(0, at - 8) : at], row[at : at + 1], row[at + 1 : at + 5]
                parts = [self.backbone.text_tokenizer.decode(ids) for ids in (before, token, after)]
                best = (value, f"{parts[0]}[{parts[1]}]{parts[2]}")
        return best[1].replace("\n", "⏎").replace("|", "\\|").replace("`", "'")

    def attributions(self, n: int) -> tuple[int, float, float]:
        """Over the last tokens of n texts: how many had a correlation, and the medians of Pearson and Spearman."""
        rows = self.others()[:n]
        found = []
        for row in rows:
            study = AttributionStudy(self.backbone, self.dictionaries, row[:-1], Target(row[-1]), count=20)
            report = study.report(study.run(study.attributions))
            if report.pearson is not None and report.spearman is not None:
                found.append((report.pearson, report.spearman))
        return len(found), median(p for p, _ in found), median(s for _, s in found)


def _interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*columns: str) -> list[str]:
    return [_row(columns), _row(["---"] * len(columns))]


def tables(study: Study) -> str:
    """The tables of STUDY.md."""
    found = _head(
        "kind", "set a", "set b", "texts", "at q ≤ 0.05", "chosen", "feature", "AUC", "effect size", "example"
    )
    ablated = _head("feature", "texts", "active on", "Δ loss, nats a token", "Δ loss where active", "KL where active")
    reach = _head("feature", "0", "1", "2", "3-4", "5-8", "9-16", "17-32")
    edited = _head("kind", "features set on all tokens", "Δ loss on a", "Δ loss on b", "favours a by")
    for question in QUESTIONS:
        a = study.halves(question.belongs_to_a, question.pieces, question.piece_in_a)
        b = study.halves(question.belongs_to_b, question.pieces, question.piece_in_b)
        others = study.others(question.belongs_to_a, question.belongs_to_b)
        contrasts = study.contrast(a.find, b.find)
        towards_a = [each for each in contrasts if each.auc > 0.5]
        chosen = {
            "surest": towards_a[0],
            f"largest effect of the {CANDIDATES} surest": study.most_causal(contrasts, a.find[:TEXTS_TO_CHOOSE]),
        }
        for how, contrast in chosen.items():
            feature = contrast.feature
            number = f"`{feature.dictionary}:{feature.feature}`"
            found.append(
                _row(
                    [
                        question.kind,
                        question.a,
                        question.b,
                        f"{len(a.find)} + {len(b.find)}",
                        f"{sum(each.q_value <= 0.05 for each in contrasts)}",
                        how,
                        number,
                        f"{contrast.auc:.3f}",
                        f"{contrast.effect_size:.2f}",
                        f"`{study.example(feature, a.measure)}`",
                    ]
                )
            )
            for title, rows in (("a", a.measure), ("b", b.measure), ("other kinds", others)):
                effect = study.ablate(feature, rows)
                share = effect.active_tokens / effect.everywhere.n_tokens
                ablated.append(
                    _row(
                        [
                            f"{question.kind}, {number}",
                            f"{title} ({len(rows)})",
                            f"{share:.2%}",
                            _interval(effect.everywhere.delta_loss, effect.delta_loss_interval),
                            f"{effect.at_active.delta_loss:+.4f}" if effect.active_tokens else "",
                            f"{effect.at_active.kl:.4f}" if effect.active_tokens else "",
                        ]
                    )
                )
                if title == "a":
                    by_first = {each.first: each.figures.kl for each in effect.by_distance}
                    distances = [by_first.get(first) for first in (0, 1, 2, 3, 5, 9, 17)]
                    cells = ["" if kl is None else f"{kl:.4f}" for kl in distances]
                    reach.append(_row([f"{question.kind}, {number}", *cells]))
        for n_features in (1, TOGETHER):
            edits, factor = study.suggestion(towards_a[:n_features], a.find[:TEXTS_TO_CHOOSE], b.find[:TEXTS_TO_CHOOSE])
            on_a, on_b = study.edited(edits, a.measure), study.edited(edits, b.measure)
            which = "the surest" if n_features == 1 else f"the {n_features} surest"
            edited.append(
                _row(
                    [
                        question.kind,
                        f"{which}, at {factor:g} × their typical peak in a",
                        _interval(on_a.delta_loss, on_a.interval),
                        _interval(on_b.delta_loss, on_b.interval),
                        f"{on_b.delta_loss - on_a.delta_loss:+.4f}",
                    ]
                )
            )
    n, pearson, spearman = study.attributions(40)
    return "\n".join(
        [
            "### Features found",
            "",
            *found,
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


def speed(
    backbone: Backbone, dictionaries: Mapping[str, Dictionary], rows: Sequence[Row], n_features: int = 24
) -> tuple[int, float, float]:
    """Number of variants of an ablation study, seconds one by one (a whole forward each), and seconds of the study.

    One by one is what there would be without a shared prefix: every variant by itself from the embedding on, its loss,
    and its KL from the unedited predictions, which are computed once a row.
    """
    features = strongest_features(total_activation(backbone, dictionaries, rows), n_features)
    began = time.perf_counter()
    study = AblationStudy(backbone, dictionaries, rows, features)
    for batch in in_batches(study.variants, TOKENS_PER_BATCH):
        study.run(batch)
    together = time.perf_counter() - began
    began = time.perf_counter()
    unedited = [_log_probabilities(backbone, row, [], dictionaries) for row in rows]
    for variant in study.variants:
        feature, row = features[variant.feature], rows[variant.row]
        edits = [Edit(feature.dictionary, feature.feature, "ablate_zero")]
        edited = _log_probabilities(backbone, row, edits, dictionaries)
        F.nll_loss(edited[:-1], torch.tensor(row[1:]))
        F.kl_div(edited, unedited[variant.row], reduction="none", log_target=True).sum(-1)
    return len(study.variants), time.perf_counter() - began, together


@torch.no_grad()
def _log_probabilities(
    backbone: Backbone, row: Row, edits: Sequence[Edit], dictionaries: Mapping[str, Dictionary]
) -> torch.Tensor:
    """Of the next token after each of the row's, [T, vocab], from one whole forward."""
    batch = BatchEdits([BatchRow(RowEdits(edits, dictionaries, len(row)), 0, len(row), row)])
    packed = PackedTokens.from_rows([row])
    logits = backbone.forward(packed, edit=batch.apply, edit_sites=batch.sites, logits="all").logits
    assert logits is not None
    return logits.log_softmax(-1)


def speed_table(study: Study, rounds: int = 3) -> str:
    """Medians over rounds, each of which measures both ways one after the other."""
    rows = study.others()[:24]
    generator = random.Random(study.seed)
    large = Backbone.random_gpt2_small(study.seed)
    large_rows = [[generator.randrange(large.vocab_size) for _ in range(WINDOW)] for _ in range(4)]
    cases: list[tuple[Backbone, str, Dictionary, Sequence[Row], int]] = [
        (study.backbone, f"builtin, {name}", study.dictionaries[name], rows, 24)
        for name in ("resid-mid", "mlp-mid", "resid-late")
    ]
    cases.append((large, "GPT-2 small's shape, 32,768 latents", _random_dictionary(large, study.seed), large_rows, 8))
    lines = [
        _row(["model and dictionary", "site", "variants", "one by one", "shared and batched", "ratio"]),
        _row(["---"] * 6),
    ]
    for backbone, name, dictionary, texts, n_features in cases:
        found = [speed(backbone, {"dictionary": dictionary}, texts, n_features) for _ in range(rounds)]
        alone, together = median(each[1] for each in found), median(each[2] for each in found)
        ratios = sorted(each[1] / each[2] for each in found)
        lines.append(
            _row(
                [
                    name,
                    f"{dictionary.site}",
                    f"{found[0][0]}",
                    f"{alone:.2f} s",
                    f"{together:.2f} s",
                    f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                ]
            )
        )
    return "\n".join(lines)


def _random_dictionary(backbone: Backbone, seed: int) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.nn.functional.normalize(torch.randn(32_768, backbone.d_model, generator=generator), dim=1)
    return Dictionary(
        encoder=encoder,
        decoder=encoder,
        pre_bias=torch.zeros(backbone.d_model),
        latent_bias=torch.zeros(len(encoder)),
        activation="topk",
        k=32,
        normalization="layer_norm",
        site="8.resid_post_mlp",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the halves and of the bootstrap")
    parser.add_argument("--speed", action="store_true", help="measure the speed only")
    arguments = parser.parse_args()
    study = Study(arguments.seed)
    print(speed_table(study) if arguments.speed else tables(study))


if __name__ == "__main__":
    main()
