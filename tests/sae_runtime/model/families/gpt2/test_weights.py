"""GPT-2's weights from Hugging Face files: names, dtypes, fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_runtime import Backbone
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
