"""A fingerprint tells dictionaries apart, and not how one was loaded."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_runtime import Dictionary, load_dictionary, save_dictionary
from sae_runtime.dictionary.manifest import BackboneReference
from tests.builders import random_dictionary


@pytest.fixture
def dictionary() -> Dictionary:
    return random_dictionary("1.resid_post_mlp", 32, k=8, normalize=True, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_a_published_one(dictionary: Dictionary, tmp_path: Path, dtype: torch.dtype) -> None:
    save_dictionary(dictionary, tmp_path / "mid", backbone=BackboneReference("small", "ab"))
    expected = hashlib.sha256((tmp_path / "mid" / "weights.safetensors").read_bytes()).hexdigest()
    loaded = load_dictionary(tmp_path / "mid", dtype=dtype)
    assert loaded.fingerprint == expected
    assert replace(loaded, name="another name").fingerprint == expected


def test_of_one_that_is_not_published(dictionary: Dictionary) -> None:
    assert len(dictionary.fingerprint) == 64
    assert replace(dictionary, name="x", site="2.resid_post_mlp", statistics=None).fingerprint == dictionary.fingerprint
    changed = dictionary.latent_bias.clone()
    changed[5] += 1e-3
    others = [
        replace(dictionary, latent_bias=changed),
        replace(dictionary, k=9),
        replace(dictionary, normalization="none"),
        replace(dictionary, decoder=dictionary.decoder.flip(0)),
        dictionary.to(dtype=torch.bfloat16),
    ]
    assert len({dictionary.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_the_folder_of_a_dictionary(dictionary: Dictionary, tmp_path: Path) -> None:
    folder = tmp_path / "mid"
    save_dictionary(dictionary, folder, backbone=BackboneReference("small", "ab"))
    assert load_dictionary(folder).folder == folder
    assert load_dictionary(folder / "dictionary.json").folder == folder
    assert load_dictionary("resid-mid").folder is not None
