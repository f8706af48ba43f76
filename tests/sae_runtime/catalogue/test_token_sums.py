"""Sums by token against plain counting, exact and within their limit."""

import numpy as np
import pytest

from sae_runtime.catalogue.token_sums import TokenSums
from tests.sae_runtime.catalogue.conftest import N_LATENTS, Collect, ReferenceToken, activations


def share_explained(z: np.ndarray, ids: np.ndarray) -> float:
    """By the definition: the variance of the mean of each token's tokens, over the whole variance."""
    means = {token: z[ids == token].mean() for token in np.unique(ids)}
    return float(np.var([means[token] for token in ids]) / z.var())


def test_they_are_those_of_plain_counting(collected: Collect, reference: list[ReferenceToken]) -> None:
    collection = collected()
    sums, rates = collection.token_sums, collection.rates
    z, ids = activations(reference).astype(np.float64), np.array([token.id for token in reference])
    assert sums.occurrences.tolist() == np.bincount(ids, minlength=257).tolist()
    for latent in range(N_LATENTS - 1):
        tokens, of_token, counts = sums.tokens(latent)
        fires = z[:, latent] > 0
        assert tokens.tolist() == np.unique(ids[fires]).tolist()
        assert counts.tolist() == [(fires & (ids == token)).sum() for token in tokens]
        assert of_token == pytest.approx([z[ids == token, latent].sum() for token in tokens], rel=1e-5)
        explained = sums.explained(latent, rates.total[latent], rates.squares[latent])
        assert explained == pytest.approx(share_explained(z[:, latent], ids), abs=1e-4)
    assert sums.explained(N_LATENTS - 1, 0.0, 0.0) is None  # it never fires
    assert [len(array) for array in sums.tokens(N_LATENTS - 1)] == [0, 0, 0]


def test_a_full_table_forgets_the_weakest_tokens() -> None:
    generator = np.random.default_rng(0)
    n_latents, vocab_size, n = 3, 500, 40_000
    # Latent 0 fires on few tokens often and on many rarely, latent 1 on one token, latent 2 on all alike.
    ids = np.minimum((generator.pareto(1.0, n) * 4).astype(np.int64), vocab_size - 1)
    z = np.stack([(ids % 7 + 1) * (ids < 400), 3.0 * (ids == 2), generator.random(n)], axis=1)
    sums = TokenSums(n_latents, vocab_size, max_pairs=1)  # means 64 a latent
    for chunk in np.array_split(np.arange(n), 10):
        tokens, latents = np.nonzero(z[chunk])
        sums.add(latents, ids[chunk][tokens], z[chunk][tokens, latents], ids[chunk])
        sums.tokens(0)  # merges what came
    for latent in range(n_latents):
        tokens, of_token, counts = sums.tokens(latent)
        assert len(tokens) <= 64
        exact = np.array([z[ids == token, latent].sum() for token in tokens])
        strongest = of_token.argmax()
        assert tokens[strongest] == tokens[exact.argmax()]
        assert of_token[strongest] == pytest.approx(exact[strongest])  # never forgotten
        assert (of_token <= exact + 1e-6).all()
        assert (counts <= [np.count_nonzero(z[ids == token, latent]) for token in tokens]).all()
        bound = sums.explained(latent, z[:, latent].sum(), np.square(z[:, latent]).sum())
        share = share_explained(z[:, latent], ids)
        assert bound is not None
        assert 0.6 * share - 0.02 < bound <= share + 1e-9
