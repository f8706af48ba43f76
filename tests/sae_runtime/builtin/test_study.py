"""The study's sets of texts: seeded, apart from each other, and what they say they are."""

from __future__ import annotations

import pytest

from sae_runtime.builtin.study.measure import Study
from sae_runtime.builtin.study.speed import speed
from sae_runtime.builtin.study.texts import MOST_TEXTS, QUESTIONS, WINDOW, Question

pytestmark = pytest.mark.any_cpu


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(seed=0)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.kind)
def test_the_halves_share_no_text_and_are_drawn_by_the_seed(study: Study, question: Question) -> None:
    decode = study.backbone.text_tokenizer.decode
    sides = {}
    for side, belongs, keep in (
        ("a", question.belongs_to_a, question.piece_in_a),
        ("b", question.belongs_to_b, question.piece_in_b),
    ):
        halves = study.texts.halves(belongs, question.pieces, keep)
        assert halves == study.texts.halves(belongs, question.pieces, keep)
        for rows in (halves.find, halves.measure):
            assert 5 <= len(rows) <= MOST_TEXTS
            assert all(8 <= len(row) <= WINDOW for row in rows)
        # A short text can be in two documents by chance: "Therefore I say unto you, ".
        assert not {decode(row) for row in halves.find if len(row) > 20} & {decode(row) for row in halves.measure}
        sides[side] = {decode(row) for row in halves.find + halves.measure}
    assert not sides["a"] & sides["b"]


def test_equations_have_no_comparisons(study: Study) -> None:
    question = next(each for each in QUESTIONS if each.kind == "operator")
    a = study.texts.halves(question.belongs_to_a, question.pieces, question.piece_in_a)
    b = study.texts.halves(question.belongs_to_b, question.pieces, question.piece_in_b)
    text = study.backbone.text_tokenizer.decode
    assert all("=" in text(row) and not set("<>≤≥≈") & set(text(row)) for row in a.find + a.measure)
    assert all(set("<>≤≥") & set(text(row)) for row in b.find + b.measure)


def test_both_ways_of_the_speed_run_the_same_variants(study: Study) -> None:
    n_variants, alone, together = speed(
        study.backbone, {"resid-mid": study.dictionaries["resid-mid"]}, study.texts.others()[:2], 3
    )
    assert 1 <= n_variants <= 6
    assert alone > 0
    assert together > 0
