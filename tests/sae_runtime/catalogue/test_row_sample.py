"""The sampled rows hold all activations, and are the same in whatever passes the text comes."""

import numpy as np
import pytest

from tests.sae_runtime.catalogue.conftest import N_LATENTS, Collect, ReferenceToken, activations


def test_a_sample_of_whole_rows(collected: Collect, reference: list[ReferenceToken]) -> None:
    z = activations(reference)
    sample = collected().rows.sample()
    assert 200 <= len(sample.token) < 200 + 32
    dense = np.zeros((len(sample.token), N_LATENTS), np.float32)
    dense[sample.firings.token, sample.firings.latent] = sample.firings.value
    assert dense == pytest.approx(z[sample.token], rel=1e-4, abs=1e-5)
    for index, token in enumerate(sample.token.tolist()):  # whole rows
        row = [i for i, other in enumerate(reference) if i - other.position == token - reference[token].position]
        assert sample.token[sample.begin[index] : sample.end[index]].tolist() == row
    other = collected(tokens_per_pass=500).rows.sample()
    assert other.token.tolist() == sample.token.tolist()
    assert collected(seed=1).rows.sample().token.tolist() != sample.token.tolist()
    assert len(collected(sample_tokens=100_000).rows.sample().token) == len(reference)


def test_silent_tokens(collected: Collect, reference: list[ReferenceToken]) -> None:
    z, sample = activations(reference), collected(sample_tokens=400).rows.sample()
    for latent in range(N_LATENTS):
        assert sample.fires_on(latent).tolist() == np.flatnonzero(z[sample.token, latent] > 0).tolist()
        drawn = [sample.silent(latent, half, 8, seed=0) for half in (0, 1)]
        for half, index in enumerate(drawn):
            assert len(set(index.tolist())) == len(index) > 2
            assert (z[sample.token[index], latent] == 0).all()
            assert (sample.half[index] == half).all()
    assert sample.silent(0, 0, 8, seed=0).tolist() != sample.silent(1, 0, 8, seed=0).tolist()
