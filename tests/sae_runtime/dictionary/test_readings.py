"""One encoding for all who ask, and what cannot be asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.dictionary.readings import Readings
from tests.builders import random_dictionary

DICTIONARY = random_dictionary("0.resid_post_mlp", 16, k=4, normalize=True, seed=0)
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def test_everybody_shares_one_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = Dictionary.encode

    def counted(self: Dictionary, x: Tensor) -> SparseFeatures:
        encoded.append(len(x))
        return encode(self, x)

    expected = DICTIONARY.encode_dense(X)
    monkeypatch.setattr(Dictionary, "encode", counted)
    readings = Readings()
    wanted = [np.array([1, 4]), np.array([0, 4, 7])]
    for tokens in wanted:
        readings.want(DICTIONARY, tokens)
    assert readings.covers(DICTIONARY, np.array([0, 1]))
    assert not readings.covers(DICTIONARY, np.array([0, 2]))
    for tokens in wanted:
        rows = readings.read(DICTIONARY, X).rows(tokens)
        torch.testing.assert_close(rows.to_dense(), expected[tokens])
        assert rows.input_statistics is not None
    assert encoded == [4]
    (reading,) = readings.made
    assert reading.tokens.tolist() == [0, 1, 4, 7]
    assert not reading.edited


def test_before_and_after_edits_are_two_readings() -> None:
    readings = Readings()
    tokens = np.arange(8)
    readings.want(DICTIONARY, tokens)
    readings.want(DICTIONARY, tokens, edited=True)
    before, after = readings.read(DICTIONARY, X), readings.read(DICTIONARY, X + 1, edited=True)
    torch.testing.assert_close(before.features.to_dense(), DICTIONARY.encode_dense(X))
    torch.testing.assert_close(after.features.to_dense(), DICTIONARY.encode_dense(X + 1))
    assert [reading.edited for reading in readings.made] == [False, True]


def test_what_was_read_cannot_grow() -> None:
    readings = Readings()
    with pytest.raises(KeyError):
        readings.read(DICTIONARY, X)
    readings.want(DICTIONARY, np.array([2, 3]))
    reading = readings.read(DICTIONARY, X)
    readings.want(DICTIONARY, np.array([3]))  # is there
    with pytest.raises(RuntimeError, match="was read before"):
        readings.want(DICTIONARY, np.array([3, 5]))
    with pytest.raises(KeyError, match="was not asked to read"):
        reading.rows(np.array([5]))
