"""Probes of all columns at once against plain gradient descent on one dense column at a time, in float64."""

import math

import numpy as np
import pytest

from sae_runtime.evaluation.logistic_probes import SparseExamples, fit_probes, probe_loss
from tests.sae_runtime.evaluation.reference import fit_slowly


def sparse(dense: np.ndarray) -> SparseExamples:
    example, column = np.nonzero(dense)
    order = np.random.default_rng(0).permutation(len(example))  # no order is promised
    return SparseExamples(example[order], column[order], dense[example, column][order], *dense.shape)


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.3
    dense = rng.exponential(3, (200, 12)) * (rng.random((200, 12)) < 0.2)
    dense[:, 1] += 4 * labels * rng.random(200)  # a good latent
    dense[:, 2] = 7.0 * labels  # a perfect one: separable
    dense[:, 3] = 0  # one that never fires
    dense[:, 4] = rng.normal(size=200) * 100  # a dense column of both signs, as coordinates are
    dense[:, 5] = 1e-3 * dense[:, 1]  # the scale of a latent does not matter
    dense[:, 6] = 2.0  # the same everywhere
    return dense, labels


def test_every_column_as_if_it_were_fitted_alone(data: tuple[np.ndarray, np.ndarray]) -> None:
    dense, labels = data
    probes = fit_probes(sparse(dense), labels)
    for column in range(dense.shape[1]):
        w, b, loss = fit_slowly(dense[:, column], labels)
        assert probes.loss[column] == pytest.approx(loss, rel=1e-5, abs=1e-6), column
        found = probes.weight[column] * dense[:, column] + probes.bias[column]
        assert found == pytest.approx(w * dense[:, column] + b, rel=1e-3, abs=1e-3), column
    share = labels.mean()
    entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert probes.loss[3] == pytest.approx(entropy, rel=1e-12)
    assert probes.loss[5] == pytest.approx(probes.loss[1], rel=1e-6)
    assert np.argmin(probes.loss) == 2
    assert probes.loss[2] < 0.01


def test_loss_and_accuracy_of_a_probe() -> None:
    values, labels = np.array([0.0, 1.0, 2.0, -5.0]), np.array([False, True, False, False])
    loss, accuracy = probe_loss(values, labels, 2.0, -1.0)
    logits = [-1.0, 1.0, 3.0, -11.0]
    expected = [math.log(1 + math.exp(t)) - y * t for t, y in zip(logits, labels, strict=True)]
    assert loss == pytest.approx(sum(expected) / 4)
    assert accuracy == 0.75


def test_chosen_examples_are_renumbered() -> None:
    dense = np.array([[1.0, 0, 2], [0, 3, 0], [4, 0, 5]])
    chosen = sparse(dense)[np.array([2, 0])]
    assert [chosen.of_column(c).tolist() for c in range(3)] == [[4, 1], [0, 0], [5, 2]]
    with pytest.raises(ValueError, match="both classes, found 2 positive of 2"):
        fit_probes(chosen, np.array([True, True]))
