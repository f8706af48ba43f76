"""The settings of a GPT-2 from config.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from sae_runtime import Backbone
from sae_runtime.model.families.gpt2.config import GPT2Settings
from tests.sae_runtime.model.tiny_gpt2 import rewrite_config

pytestmark = pytest.mark.any_cpu


def test_settings_are_what_transformers_reads(folder: Path, backbone: Backbone) -> None:
    """Also under transformers' other names, and with its defaults where config.json is silent."""
    values = json.loads((folder / "config.json").read_text())
    values = {name: value for name, value in values.items() if name != "n_embd" and name != "layer_norm_epsilon"}
    (folder / "config.json").write_text(json.dumps(values | {"hidden_size": 32}))
    expected = GPT2Config.from_pretrained(folder)
    for settings in (Backbone.load(folder).settings, backbone.settings):
        for name, value in asdict(settings).items():
            assert value == getattr(expected, name), name
    assert asdict(GPT2Settings.from_mapping(backbone.config.to_dict())) == asdict(backbone.settings)
    assert asdict(GPT2Settings()) == {name: getattr(GPT2Config(), name) for name in asdict(GPT2Settings())}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama'.*only 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 5}, "not a multiple of n_head 5"),
        ({"n_layer": "3"}, "n_layer is '3'"),
        ({"tie_word_embeddings": False}, r"missing keys: lm_head\.weight"),
    ],
)
def test_other_models_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        Backbone.load(folder)


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        Backbone.load(folder)
