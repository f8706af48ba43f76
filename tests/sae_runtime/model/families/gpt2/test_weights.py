"""GPT-2's weights from Hugging Face files: names, dtypes, fingerprints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_runtime import Backbone
from sae_runtime.model.packed import PackedTokens
from tests.sae_runtime.model.tiny_gpt2 import GOLDEN, IDS, SITE, rewrite_config, rewrite_weights, same

pytestmark = pytest.mark.any_cpu


def test_names_without_prefix_and_mask_buffers(folder: Path, backbone: Backbone) -> None:
    """openai-community/gpt2's file: `h.0.attn.c_attn.weight` and causal masks `h.0.attn.bias`."""

    def as_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
        return plain | masks

    rewrite_weights(folder, as_published)
    assert "h.0.ln_1.weight" in load_file(folder / "model.safetensors")
    assert same(Backbone.load(folder), backbone)


def test_the_golden_file_has_prefixes_and_no_head(backbone: Backbone) -> None:
    names = load_file(GOLDEN / "model.safetensors").keys()
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    assert (backbone.n_layers, backbone.d_model, backbone.context_length, backbone.vocab_size) == (3, 32, 64, 120)
    assert backbone.name == str(GOLDEN)


def test_a_repeated_tied_head_changes_nothing(folder: Path, backbone: Backbone) -> None:
    rewrite_weights(folder, lambda state: state | {"lm_head.weight": state["transformer.wte.weight"].clone()})
    assert same(Backbone.load(folder), backbone)


def test_float16_files_have_the_fingerprint_of_the_float32_weights(folder: Path, backbone: Backbone) -> None:
    rewrite_weights(folder, lambda state: {name: tensor.half() for name, tensor in state.items()})
    half = Backbone.load(folder)
    assert half.dtype == torch.float32
    assert half.fingerprint == backbone.fingerprint
    rounded, exact = (model.activations(IDS, sites=[SITE])[SITE] for model in (half, backbone))
    assert 0 < (rounded - exact).norm() < 0.01 * exact.norm()


def test_the_fingerprint_sees_weights_and_settings(folder: Path, backbone: Backbone) -> None:
    rewrite_config(folder, n_head=8)
    assert Backbone.load(folder).fingerprint != backbone.fingerprint
    rewrite_config(folder, n_head=4, activation_function="gelu_pytorch_tanh")  # another name of gelu_new
    assert Backbone.load(folder).fingerprint == backbone.fingerprint
    rewrite_weights(folder, lambda state: state | {"transformer.ln_f.bias": state["transformer.ln_f.bias"] + 0.01})
    assert Backbone.load(folder).fingerprint != backbone.fingerprint


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("transformer.h.1.mlp.c_fc.bias"), r"missing keys: transformer\.h\.1\.mlp\.c_fc\.bias"),
        (lambda state: state | {"transformer.h.0.extra": torch.zeros(2)}, "unexpected keys.*extra"),
        (
            lambda state: state | {"transformer.wpe.weight": torch.zeros(3, 32)},
            r"do not fit.*wpe\.weight \[3, 32\], expected \[64, 32\]",
        ),
        (lambda state: state | {"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}, "not floating.*ln_f"),
    ],
)
def test_weights_that_do_not_fit_the_config(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    rewrite_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        Backbone.load(folder)


# Weights that are not used, and weights that config.json contradicts


def test_a_head_of_its_own_where_the_config_says_tied(folder: Path) -> None:
    """transformers keeps both as they are stored, and warns."""
    head = torch.randn(120, 32, generator=torch.Generator().manual_seed(1))
    rewrite_weights(folder, lambda state: state | {"lm_head.weight": head})
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        backbone = Backbone.load(folder)
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(folder).eval()(IDS).logits[0]
    logits = backbone.forward(PackedTokens.from_rows(IDS.tolist()), logits="all").logits
    assert logits is not None
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 1
    assert backbone.fingerprint != Backbone.load(GOLDEN).fingerprint


def test_a_head_of_another_shape_where_the_config_says_tied(folder: Path) -> None:
    rewrite_weights(folder, lambda state: state | {"lm_head.weight": torch.zeros(7, 32)})
    message = r"lm_head\.weight \[7, 32\], expected \[120, 32\]"
    with pytest.warns(UserWarning, match="tie_word_embeddings"), pytest.raises(ValueError, match=message):
        Backbone.load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "v_head.summary.weight",
        "v_head.summary.bias",
        "value_head.weight",
        "score.weight",
        "classifier.bias",
        "multiple_choice_head.summary.weight",
        "qa_outputs.weight",
    ],
)
def test_a_head_for_another_task_is_ignored_with_a_note(folder: Path, backbone: Backbone, name: str) -> None:
    rewrite_weights(folder, lambda state: state | {name: torch.ones(1, 32)})
    with pytest.warns(UserWarning, match=f"not used: {re.escape(name)}"):
        assert same(Backbone.load(folder), backbone)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.bias",
        "transformer.h.0.attn.c_attn.lora_A.weight",
        "transformer.h.3.ln_1.weight",
        "transformer.h.0.crossattention.c_attn.weight",
        "transformer.prompt_embeddings.weight",
        "soft_prompt.weight",
    ],
)
def test_weights_that_would_change_the_model_are_refused(folder: Path, name: str) -> None:
    rewrite_weights(folder, lambda state: state | {name: torch.ones(32)})
    with pytest.raises(ValueError, match=f"unexpected keys: .*{re.escape(name)}"):
        Backbone.load(folder)


def test_one_tensor_under_two_names(folder: Path) -> None:
    rewrite_weights(folder, lambda state: state | {"ln_f.bias": torch.ones(32)})
    with pytest.raises(ValueError, match=r"both transformer\.ln_f\.bias and ln_f\.bias"):
        Backbone.load(folder)


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.weight"])
def test_weights_that_are_not_finite(folder: Path, name: str, value: float) -> None:
    def spoil(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state[name].view(-1)[3] = value
        return state

    rewrite_weights(folder, spoil)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: {re.escape(name)} holds NaN or infinite"):
        Backbone.load(folder)


def test_weights_that_overflow_the_dtype_they_are_loaded_as(folder: Path) -> None:
    rewrite_weights(folder, lambda state: state | {"transformer.ln_f.bias": torch.full((32,), 1e5)})
    Backbone.load(folder, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"ln_f\.bias holds NaN or infinite values in torch\.float16"):
        Backbone.load(folder, dtype="float16")
