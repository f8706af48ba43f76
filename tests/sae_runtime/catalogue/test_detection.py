"""Detection against scikit-learn's definition, on a test set with as many silent tokens as active ones."""

import numpy as np
import pytest

from sae_runtime.catalogue.detection import detection, silent_weights
from tests.sae_runtime.catalogue.vocabulary import examples


def test_a_balanced_test() -> None:
    rows = examples([["a"]] * 8, active=[1, 1, 1, 1, 0, 0, 0, 0])
    predicted = np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
    figures = detection(predicted, rows)  # 3 true, 1 false positive, 1 false negative
    assert (figures.precision, figures.recall, figures.f1) == (3 / 4, 3 / 4, 3 / 4)
    assert (figures.n_positive, figures.n_negative) == (4, 4)


def test_random_and_hard_silent_tokens_weigh_half_each_whatever_their_number() -> None:
    rows = examples([["a"]] * 12, active=[1, 1] + [0] * 10, hard=[0] * 10 + [1, 1])
    weights = silent_weights(rows)
    assert weights[:2].tolist() == [0, 0]
    assert weights[2:10].sum() == pytest.approx(0.5)
    assert weights[10:].sum() == pytest.approx(0.5)
    predicted = np.array([1, 1] + [0] * 8 + [1, 0], bool)  # half of the hard ones: a quarter of 2 silent tokens
    assert detection(predicted, rows).precision == pytest.approx(2 / 2.5)


def test_any_token_has_an_f1_of_two_thirds_and_nothing_of_zero() -> None:
    rows = examples([["a"]] * 30, active=[1] * 10 + [0] * 20)
    assert detection(np.ones(30, bool), rows).f1 == pytest.approx(2 / 3)
    none = detection(np.zeros(30, bool), rows)
    assert (none.f1, none.precision, none.recall) == (0, 0, 0)


@pytest.mark.parametrize("active", [[0, 0], [1, 1]])
def test_a_test_needs_both(active: list[int]) -> None:
    with pytest.raises(ValueError, match="needs both active and silent ones"):
        detection(np.ones(2, bool), examples([["a"]] * 2, active=active))
