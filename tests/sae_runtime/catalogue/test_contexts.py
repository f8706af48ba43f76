"""The chosen contexts against a search over all activations."""

from itertools import pairwise

import numpy as np
import pytest

from sae_runtime.catalogue.contexts import ChosenContexts, half_of
from sae_runtime.catalogue.neighbors import companions, nearest_latents
from sae_runtime.dictionary.dictionary import Dictionary
from tests.sae_runtime.catalogue.conftest import N_LATENTS, Array, Collect, ReferenceToken, activations


def stretches(reference: list[ReferenceToken]) -> list[range]:
    """The tokens of every row."""
    starts = [i for i, token in enumerate(reference) if token.position == 0] + [len(reference)]
    return [range(a, b) for a, b in pairwise(starts)]


def check_windows(contexts: ChosenContexts, z: Array, rows: list[range]) -> None:
    """z: [tokens] of the latent. The window is 4 tokens before the peak, 3 after it."""
    for token, found in zip(contexts.token.tolist(), contexts.activations, strict=True):
        row = next(row for row in rows if token in row)
        expected = np.array([z[i] if i in row else 0 for i in range(token - 4, token + 4)])
        assert found == pytest.approx(expected, abs=float(expected.max()) / 250)
        assert ((found > 0) == (expected > 0)).all()  # what is small is not rounded to silence


@pytest.mark.parametrize("tokens_per_pass", [32, 100_000])
def test_the_strongest_one_of_each_document(
    collected: Collect, reference: list[ReferenceToken], tokens_per_pass: int
) -> None:
    contexts = collected(tokens_per_pass=tokens_per_pass).contexts
    z, rows = activations(reference), stretches(reference)
    document = np.array([token.document for token in reference])
    for half in (0, 1):
        documents = np.unique(document)[half_of(0, np.unique(document)) == half]
        assert len(documents) > 3
        for latent in range(N_LATENTS):
            strongest = [np.flatnonzero(document == d)[z[document == d, latent].argmax()] for d in documents]
            strongest = sorted((i for i in strongest if z[i, latent] > 0), key=lambda i: -z[i, latent])
            found = contexts.strongest(latent, half)
            assert z[found.token, latent] == pytest.approx(z[strongest[:3], latent], rel=1e-4)
            assert len(set(document[found.token])) == len(found.token)
            assert (half_of(0, document[found.token]) == half).all()
            check_windows(found, z[:, latent], rows)


def test_random_ones_of_all_and_of_each_quantile(
    collected: Collect, reference: list[ReferenceToken], dictionary: Dictionary
) -> None:
    contexts, others = collected().contexts, collected(tokens_per_pass=500).contexts
    reseeded = collected(seed=1).contexts
    z, rows = activations(reference), stretches(reference)
    assert dictionary.statistics is not None
    levels = dictionary.statistics.quantile_levels
    bounds = dictionary.statistics.quantiles[:, (levels > 0.05) & (levels < 0.95)].numpy()
    half = half_of(0, np.array([token.document for token in reference]))
    near = companions(*nearest_latents(dictionary.decoder, None, 3))
    assert contexts.n_quantiles == bounds.shape[1] + 1
    differ = 0
    for latent in range(N_LATENTS):
        for h in (0, 1):
            fires = np.flatnonzero((z[:, latent] > 0) & (half == h))
            found = contexts.random(latent, h)
            assert set(found.token) <= set(fires)
            assert len(set(found.token)) == min(4, len(fires))
            check_windows(found, z[:, latent], rows)
            # The choice depends on the seed alone, not on how the text is passed.
            assert found.token.tolist() == others.random(latent, h).token.tolist()
            differ += found.token.tolist() != reseeded.random(latent, h).token.tolist()
            for token, bits in zip(found.token, found.silent.tolist(), strict=True):
                for i, companion in enumerate(near[latent]):
                    assert bool(bits >> i & 1) == (companion >= 0 and z[token, companion] == 0)
            quantile = (z[:, latent, None] > bounds[latent]).sum(1)
            for q in range(contexts.n_quantiles):
                inside = set(fires[quantile[fires] == q])
                chosen = contexts.of_quantile(latent, h, q)
                assert set(chosen.token) <= inside
                assert len(set(chosen.token)) == min(2, len(inside))
                check_windows(chosen, z[:, latent], rows)
    assert differ > N_LATENTS


def test_random_ones_are_uniform(collected: Collect, reference: list[ReferenceToken]) -> None:
    """Over many seeds every activation of a latent is chosen equally often."""
    z = activations(reference)
    latent = int((z > 0).sum(0).argmax())
    fires = np.flatnonzero(z[:, latent] > 0)
    chosen = np.zeros(len(reference))
    for seed in range(12):
        contexts = collected(seed=seed, tokens_per_pass=100_000).contexts
        for half in (0, 1):
            chosen[contexts.random(latent, half).token] += 1
    early, late = chosen[fires[: len(fires) // 2]].sum(), chosen[fires[len(fires) // 2 :]].sum()
    assert early + late == 12 * 8
    assert 25 <= early <= 71  # p = 3e-6 of a fair coin


@pytest.mark.parametrize("tokens_per_pass", [32, 100_000])
def test_more_activations_to_find_labels_on(
    collected: Collect, reference: list[ReferenceToken], tokens_per_pass: int
) -> None:
    contexts = collected(label_activations=9, tokens_per_pass=tokens_per_pass).contexts
    z = activations(reference)
    half = half_of(0, np.array([token.document for token in reference]))
    for latent in range(N_LATENTS):
        fires = np.flatnonzero((z[:, latent] > 0) & (half == 0))
        token, value = contexts.for_labels(latent)
        assert set(token) <= set(fires)
        assert len(set(token)) == min(9, len(fires))
        assert value == pytest.approx(z[token, latent], rel=1e-4)
