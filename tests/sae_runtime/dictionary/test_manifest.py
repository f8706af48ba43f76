"""The manifest: JSON there and back, and every wrong key named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sae_runtime import DictionaryFormatError, Manifest
from sae_runtime.dictionary.manifest import BackboneReference, Provenance


def example() -> Manifest:
    return Manifest(
        name="resid-mid",
        backbone=BackboneReference("builtin", "ab" * 32, "cd" * 32),
        site="2.resid_post_mlp",
        architecture="topk",
        d_in=256,
        n_latents=4096,
        k=32,
        normalization="layer_norm",
        tied=False,
        dtype="float16",
        context_length=512,
        provenance=Provenance("0.1.0", {"lr": 1e-4}, 7, 10_000_000, "corpus", "2026-01-01T00:00:00Z"),
        evaluation={"nmse": 0.125, "l0": 32},
        files={"weights.safetensors": "00" * 32},
    )


def test_json_there_and_back() -> None:
    assert Manifest.from_json(example().to_json()) == example()
    assert json.loads(example().to_json())["schema_version"] == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "schema_version is 2, this saeserve reads up to 1"),
        ("schema_version", "1", "schema_version is '1', expected a positive integer"),
        ("colour", "red", r"manifest: unknown keys \['colour'\]"),
        ("backbone.size", 3, r"manifest\.backbone: unknown keys \['size'\]"),
        ("provenance.author", "x", r"manifest\.provenance: unknown keys \['author'\]"),
        ("d_in", "256", r"manifest\.d_in is '256', expected int"),
        ("d_in", True, r"manifest\.d_in is True, expected int"),
        ("n_latents", 0, r"manifest\.n_latents is 0, expected a positive integer"),
        ("k", 5000, r"manifest\.k is 5000, expected 1 to n_latents = 4096"),
        ("k", None, r"manifest\.k is None, expected 1 to"),
        ("architecture", "gelu", r"manifest\.architecture is 'gelu', expected"),
        ("architecture", "relu", r"manifest\.k is 32, expected null for relu"),
        ("normalization", "l2", r"manifest\.normalization is 'l2', expected"),
        ("evaluation", {"nmse": "low"}, r"manifest\.evaluation: found .* values that are numbers"),
        ("files", {"weights.safetensors": 1}, r"manifest\.files: found .* values that are strings"),
        ("backbone", "builtin", r"manifest\.backbone is 'builtin', expected BackboneReference"),
    ],
)
def test_wrong_keys_are_named(path: str, value: Any, message: str) -> None:
    raw = json.loads(example().to_json())
    *parents, key = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[key] = value
    with pytest.raises(DictionaryFormatError, match=message):
        Manifest.from_json(json.dumps(raw))


def test_missing_keys_are_named() -> None:
    raw = json.loads(example().to_json())
    del raw["site"], raw["d_in"]
    with pytest.raises(DictionaryFormatError, match=r"missing keys \['site', 'd_in'\]"):
        Manifest.from_json(json.dumps(raw))
    raw = json.loads(example().to_json())
    del raw["backbone"]["fingerprint"]
    with pytest.raises(DictionaryFormatError, match=r"manifest\.backbone: missing keys \['fingerprint'\]"):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(DictionaryFormatError, match="manifest"):
        Manifest.from_json(text)
