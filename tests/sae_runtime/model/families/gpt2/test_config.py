"""The settings of a GPT-2 from config.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from sae_runtime import Backbone
from sae_runtime.model.families.gpt2.config import ACTIVATIONS, FUNCTIONS, GPT2Settings
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
        ({"activation_function": "xielu"}, "activation_function 'xielu'"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 5}, "not a multiple of n_head 5"),
        ({"n_layer": "3"}, "n_layer is '3'"),
        ({"tie_word_embeddings": False}, r"missing keys: lm_head\.weight"),
        ({"layer_norm_epsilon": "1e-05"}, r"config\.json: layer_norm_epsilon is '1e-05'"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon is True"),
        ({"scale_attn_weights": "true"}, "scale_attn_weights is 'true'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None"),
        ({"n_inner": 128.0}, r"n_inner is 128\.0"),
        ({"n_head": True}, "n_head is True"),
        ({"hidden_size": 64}, "n_embd and hidden_size are one setting, but have the values 32 and 64"),
        ({"eos_token_id": "0"}, "eos_token_id is '0'"),
        ({"eos_token_id": [0, None]}, "eos_token_id is"),
        ({"bos_token_id": [0]}, "bos_token_id is"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is .*awq.*not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
    ],
    ids=str,
)
def test_other_models_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        Backbone.load(folder)


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS} - {"gelu_accurate"}))
def test_every_activation_function_is_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(FUNCTIONS[ACTIVATIONS[name]](x), ACT2FN[name](x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [
        (7, None, {7}),
        ([7, 9], None, {7, 9}),
        (None, None, set()),
        ([], None, set()),
        (7, {}, {7}),
        (7, {"eos_token_id": None}, {7}),
        (7, {"eos_token_id": 3}, {3}),
        (7, {"eos_token_id": [3, 9], "temperature": 0.7}, {3, 9}),
        (99_999, None, {99_999}),
    ],
)
def test_what_ends_a_text(folder: Path, in_config: Any, in_generation_config: Any, expected: set[int]) -> None:
    rewrite_config(folder, eos_token_id=in_config)
    if in_generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(in_generation_config))
    backbone = Backbone.load(folder)
    assert backbone.settings.ends_of_text == expected
    assert GPT2Settings.from_mapping(backbone.config.to_dict()).ends_of_text == expected


def test_the_ends_are_those_where_transformers_stops(folder: Path) -> None:
    """A list in generation_config.json goes before the one id in config.json."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt = torch.tensor([[1, 2, 3]])
    free = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, 3:].tolist()
    rewrite_config(folder, eos_token_id=free[0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[4], 119]}))
    stopped = GPT2LMHeadModel.from_pretrained(folder).generate(
        prompt, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    ends = Backbone.load(folder).settings.ends_of_text
    first_end = next(i for i, token in enumerate(free) if token in ends)
    assert stopped[0, 3:].tolist() == free[: first_end + 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"generation_config\.json is not JSON"),
        ('{"eos_token_id": "x"}', r"generation_config\.json: eos_token_id"),
    ],
)
def test_a_wrong_generation_config(folder: Path, content: str, message: str) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Backbone.load(folder)


@pytest.mark.parametrize("content", ["[]", "null", '"gpt2"'])
def test_a_config_that_is_no_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json holds a"):
        Backbone.load(folder)


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        Backbone.load(folder)
