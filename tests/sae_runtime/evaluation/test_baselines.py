"""Baselines against NumPy in float64: singular vectors, and a random dictionary with dense latents."""

import numpy as np
import pytest
import torch

from sae_runtime.dictionary.features import InputStatistics
from sae_runtime.evaluation.baselines import Baselines, fit_baselines
from tests.sae_runtime.evaluation.reference import random_dictionary


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(400, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 3


def fitted(x: torch.Tensor, normalization: str) -> tuple[Baselines, InputStatistics | None]:
    dictionary = random_dictionary(normalization=normalization)
    parts = [x[start : start + 150] for start in range(0, len(x), 150)]
    encoded = [dictionary.encode(part) for part in parts]
    batches = [(part, f.input_statistics, f) for part, f in zip(parts, encoded, strict=True)]
    return fit_baselines(batches, dictionary.n_latents, seed=3), dictionary.encode(x).input_statistics


@pytest.mark.parametrize("normalization", ["none", "centred", "layer_norm", "constant_norm"])
def test_principal_components_are_those_of_numpy(x: torch.Tensor, normalization: str) -> None:
    baselines, statistics = fitted(x, normalization)
    wide = x.double().numpy()
    mean, std = np.zeros((400, 1)), np.ones((400, 1))
    if normalization == "layer_norm":
        mean, std = wide.mean(1, keepdims=True), wide.std(1, ddof=1, keepdims=True)
    if normalization == "centred":
        mean = wide.mean(1, keepdims=True)
    if normalization == "constant_norm":
        std = np.sqrt((wide**2).mean(1, keepdims=True))
    inner = (wide - mean) / std
    centre = inner.mean(0)
    _, singular, directions = np.linalg.svd(inner - centre)
    k = baselines.k
    assert 1 <= k <= 6
    expected = ((inner - centre) @ directions[:k].T @ directions[:k] + centre) * std + mean
    np.testing.assert_allclose(baselines.pca(x, statistics).numpy(), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(baselines.explained.numpy(), singular**2 / 400, atol=1e-5)

    for nmse in (0.9, 0.3, 0.05):
        left = [1 - (singular[:n] ** 2).sum() / (singular**2).sum() for n in range(17)]
        assert baselines.components_for(nmse) == next(n for n in range(1, 17) if left[n] <= nmse)
    assert baselines.components_for(0.0) <= 16
    np.testing.assert_allclose(baselines.mean(x, statistics).numpy(), np.tile(wide.mean(0), (400, 1)), rtol=1e-5)


@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_the_random_dictionary(x: torch.Tensor, normalization: str) -> None:
    baselines, statistics = fitted(x, normalization)
    wide = x.double().numpy()
    mean, std = np.zeros((400, 1)), np.ones((400, 1))
    if normalization == "layer_norm":
        mean, std = wide.mean(1, keepdims=True), wide.std(1, ddof=1, keepdims=True)
    inner = (wide - mean) / std
    centred = inner - inner.mean(0)
    W = baselines.directions.double().numpy()
    np.testing.assert_allclose(np.linalg.norm(W, axis=1), 1, rtol=1e-6)
    z = centred @ W.T
    for row in z:
        row[np.argsort(-row)[baselines.k :]] = 0
    z = z.clip(0)
    decoded = z @ W
    # Fitted on every eighth row of each batch: close to the factor for all of them.
    best = (decoded * centred).sum() / (decoded**2).sum()
    assert baselines.scale == pytest.approx(best, rel=0.1)
    expected = (decoded * baselines.scale + inner.mean(0)) * std + mean
    np.testing.assert_allclose(baselines.random(x, statistics).numpy(), expected, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(baselines.random_features(x, statistics).to_dense().numpy(), z, atol=2e-3)


def test_l0_of_the_dictionary_decides_k(x: torch.Tensor) -> None:
    dictionary = random_dictionary("relu", normalization="none")
    features = dictionary.encode(x)
    baselines = fit_baselines([(x, None, features)], 48, seed=0)
    assert baselines.k == round(float(features.l0.float().mean()))
    with pytest.raises(ValueError, match="at least one batch"):
        fit_baselines([], 48, seed=0)
