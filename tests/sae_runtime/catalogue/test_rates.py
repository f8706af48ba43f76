"""Rates and sums against plain counting."""

from typing import Any

import numpy as np
import pytest

from sae_runtime.catalogue.rates import position_bin
from sae_runtime.dictionary.dictionary import Dictionary
from tests.sae_runtime.catalogue.conftest import N_LATENTS, Collect, ReferenceToken, activations


@pytest.mark.parametrize("tokens_per_pass", [64, 100_000])
def test_they_are_those_of_plain_counting(
    collected: Collect,
    dictionary: Dictionary,
    reference: list[ReferenceToken],
    records: list[dict[str, Any]],
    tokens_per_pass: int,
) -> None:
    rates = collected(tokens_per_pass=tokens_per_pass, histogram_bins=8).rates
    z = activations(reference)
    fires = z > 0
    assert rates.n_tokens == len(reference)
    assert rates.fired.tolist() == fires.sum(0).tolist()
    document = np.array([token.document for token in reference])
    by_document = np.stack([fires[document == d].any(0) for d in np.unique(document)])
    assert rates.n_documents == len(by_document)
    assert rates.documents.tolist() == by_document.sum(0).tolist()
    assert rates.variance() == pytest.approx(z.var(0), rel=1e-3, abs=1e-9)

    position = np.array([token.position for token in reference])
    expected = [np.corrcoef(z[:, i], np.log2(1 + position))[0, 1] for i in range(N_LATENTS - 1)]
    assert rates.position_correlation()[:-1] == pytest.approx(expected, abs=1e-4)
    assert rates.position_correlation()[-1] == 0  # a latent that never fires
    for bin, (low, high) in enumerate([(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]):
        inside = (position >= low) & (position <= high)
        assert rates.by_position[:, bin].tolist() == fires[inside].sum(0).tolist()
        assert rates.position_tokens[bin] == inside.sum()
    assert rates.by_position.shape[1] == 6

    for groups, name in ((rates.kinds, "kind"), (rates.languages, "lang")):
        of_token = np.array([records[d].get(name, "") for d in document])
        assert set(groups.names) == set(of_token.tolist()) - {""}
        for group in groups.names:
            rate = fires[of_token == group].mean(0)
            assert [groups.rates(i)[group] for i in range(N_LATENTS)] == pytest.approx(rate.tolist())

    assert dictionary.statistics is not None
    largest = dictionary.statistics.max.numpy()
    for latent in range(N_LATENTS - 1):
        values = z[fires[:, latent], latent].clip(max=largest[latent])
        counts = np.histogram(values, 8, (0, largest[latent]))[0]
        assert np.abs(rates.histogram[latent].astype(int) - counts).sum() <= 2  # at the edge of a bin
        assert rates.histogram[latent].sum() == len(values)


def test_position_bins() -> None:
    assert position_bin(np.array([0, 1, 2, 3, 4, 7, 8, 511, 512])).tolist() == [0, 1, 2, 2, 3, 3, 4, 9, 10]
