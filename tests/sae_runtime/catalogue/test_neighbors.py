"""Neighbours against all cosines and all correlations at once."""

import numpy as np
import pytest
import torch

from sae_runtime.catalogue import neighbors
from sae_runtime.catalogue.firings import Firings
from sae_runtime.catalogue.neighbors import LEAST_TOGETHER, companions, fires_together, nearest_latents


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.cosine_similarity(a.double()[:, None], b.double()[None], dim=2).numpy()


@pytest.mark.parametrize("tile", [1, 7, 1 << 12])
def test_the_nearest_of_all(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(neighbors, "_ROWS_AT_ONCE", tile)
    generator = torch.Generator().manual_seed(0)
    decoder, others = torch.randn(20, 6, generator=generator), 3 * torch.randn(9, 6, generator=generator)
    decoder[5] = 0
    expected = cosines(decoder, decoder)
    np.fill_diagonal(expected, -2)
    expected[:, 5] = -2
    latents, scores = nearest_latents(decoder, None, 4)
    for row in range(20):
        if row == 5:
            assert latents[row].tolist() == [-1] * 4
            continue
        best = np.argsort(-expected[row])[:4]
        assert latents[row].tolist() == best.tolist()
        assert scores[row] == pytest.approx(expected[row, best], abs=1e-6)
    same = torch.cat([decoder[:1], decoder[:1], decoder[:1]])
    assert nearest_latents(same, None, 1)[0].tolist() == [[1], [0], [0]]
    latents, scores = nearest_latents(decoder, others, 20)
    assert latents.shape == (20, 9)
    assert latents[0].tolist() == np.argsort(-cosines(decoder, others)[0]).tolist()
    assert nearest_latents(decoder[:1], None, 3)[0].shape == (1, 0)


def test_companions_are_who_has_a_latent_among_its_nearest() -> None:
    nearest = np.array([[1, 2], [2, 0], [1, -1], [1, 0]])
    cosine = np.array([[0.9, 0.5], [0.8, 0.3], [0.7, 0.0], [0.95, 0.1]])
    assert companions(nearest, cosine).tolist() == [[1, 3, -1], [3, 0, 2], [1, 0, -1], [-1, -1, -1]]
    assert companions(np.zeros((3, 0), np.int64), np.zeros((3, 0))).shape == (3, 0)


@pytest.mark.parametrize("pairs", [1, 1 << 22])
def test_fires_together(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr(neighbors, "_PAIRS_AT_ONCE", pairs)
    generator = np.random.default_rng(0)
    cause = generator.random((300, 5)) < 0.2
    fires = cause[:, generator.integers(0, 5, 12)] & (generator.random((300, 12)) < 0.6)
    fires[:, 3] = False
    token, latent = np.nonzero(fires)
    firings = Firings(300, 12, token, latent, np.ones(len(token), np.float32))
    partners, phi = fires_together(firings, 3)
    for a in range(12):
        expected = {
            b: np.corrcoef(fires[:, a], fires[:, b])[0, 1]
            for b in range(12)
            if b != a and (fires[:, a] & fires[:, b]).sum() >= LEAST_TOGETHER
        }
        best = sorted((b for b in expected if expected[b] > 0), key=lambda b: -expected[b])[:3]
        assert partners[a][partners[a] >= 0].tolist() == best
        assert phi[a][: len(best)] == pytest.approx([expected[b] for b in best], abs=1e-5)
    assert partners[3].tolist() == [-1, -1, -1]
