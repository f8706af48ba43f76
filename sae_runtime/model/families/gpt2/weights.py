"""GPT-2's weights as plain tensors: from a Hugging Face folder, or random."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae_runtime.kernels.products import linear
from sae_runtime.model.families.gpt2.config import ACTIVATIONS, GPT2Settings
from sae_runtime.model.folders import read_safetensors

_MASKS = (".attn.bias", ".attn.masked_bias")
"""How the names of causal masks end; old files hold such masks."""

# Heads that people train beside the LM head, for values, rewards, classes, answers. They compute nothing here.
_OTHER_HEADS = re.compile(
    r"(v_head|value_head|reward_head|score|classifier|multiple_choice_head|qa_outputs)(\.[\w.]+)?\.(weight|bias)"
)

_LAYER_NORMS = ("ln_1", "ln_2")
_MATRICES = ("attn_c_attn", "attn_c_proj", "mlp_c_fc", "mlp_c_proj")


class Linear(NamedTuple):
    """A matrix and its bias."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor  # [outputs]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.weight.nbytes + self.bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[n, inputs] -> [n, outputs]; the result may lie in memory column by column."""
        return linear(x, self.weight, self.bias)


class BlockWeights(NamedTuple):
    """One block."""

    ln_1_weight: Tensor  # [d]
    ln_1_bias: Tensor
    attn_c_attn: Linear  # d -> 3 d
    attn_c_proj: Linear  # d -> d
    ln_2_weight: Tensor  # [d]
    ln_2_bias: Tensor
    mlp_c_fc: Linear  # d -> d_mlp
    mlp_c_proj: Linear  # d_mlp -> d


class GPT2Weights(NamedTuple):
    wte: Tensor  # [vocab, d]
    wpe: Tensor  # [context, d]
    blocks: tuple[BlockWeights, ...]
    ln_f_weight: Tensor  # [d]
    ln_f_bias: Tensor
    lm_head: Tensor  # [vocab, d], the same tensor as wte when tied


def assemble(state: Mapping[str, Tensor], n_layers: int, dtype: torch.dtype, device: torch.device) -> GPT2Weights:
    """The weights from tensors under GPT2LMHeadModel's names; `lm_head.weight` may be absent (tied).

    Raises:
        ValueError: a weight that is not finite in `dtype`; names it.
    """

    def take(name: str) -> Tensor:
        tensor = state[name].detach().to(device, dtype)
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{name} holds NaN or infinite values in {dtype}")
        return tensor

    def block(layer: int) -> BlockWeights:
        def weight_and_bias(name: str) -> tuple[Tensor, Tensor]:
            weight, bias = (take(f"transformer.h.{layer}.{_dotted(name)}.{kind}") for kind in ("weight", "bias"))
            return weight, bias

        # Matrices are [inputs, outputs] in Hugging Face's GPT-2 files (its `Conv1D`).
        ln_1, ln_2 = map(weight_and_bias, _LAYER_NORMS)
        attn_c_attn, attn_c_proj, mlp_c_fc, mlp_c_proj = (
            Linear(w.t().contiguous(), b) for w, b in map(weight_and_bias, _MATRICES)
        )
        return BlockWeights(*ln_1, attn_c_attn, attn_c_proj, *ln_2, mlp_c_fc, mlp_c_proj)

    wte = take("transformer.wte.weight")
    tied = state.get("lm_head.weight") is None or state["lm_head.weight"] is state["transformer.wte.weight"]
    return GPT2Weights(
        wte=wte,
        wpe=take("transformer.wpe.weight"),
        blocks=tuple(block(layer) for layer in range(n_layers)),
        ln_f_weight=take("transformer.ln_f.weight"),
        ln_f_bias=take("transformer.ln_f.bias"),
        lm_head=wte if tied else take("lm_head.weight"),
    )


def fingerprint(state: Mapping[str, Tensor], settings: GPT2Settings) -> str:
    """sha256 over the settings that change the results, and the weights cast to float16, in the order of their names.

    A float16 file and the float32 weights that it was made from have the same fingerprint.
    """
    deciding = {
        "activation": ACTIVATIONS[settings.activation_function],
        "layer_norm_epsilon": settings.layer_norm_epsilon,
        "n_head": settings.n_head,
        "scale_attn_by_inverse_layer_idx": settings.scale_attn_by_inverse_layer_idx,
        "scale_attn_weights": settings.scale_attn_weights,
    }
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    for name in sorted(state):
        if name == "lm_head.weight" and torch.equal(state[name], state["transformer.wte.weight"]):
            continue  # tied, whether or not the file repeats it
        half = state[name].detach().to("cpu", torch.float16).contiguous()
        digest.update(f"{name} {list(half.shape)}\n".encode())
        digest.update(half.numpy().data)
    return digest.hexdigest()


def read_folder(folder: Path) -> tuple[GPT2Settings, dict[str, Tensor]]:
    """Reads config.json and the safetensors weights, in their stored dtype, under GPT2LMHeadModel's names.

    The folder may be one that transformers' `save_pretrained` wrote (one file, or shards with an index), or the hub's
    own GPT-2, whose names lack the prefix "transformer." and whose file holds causal masks.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: not a GPT-2, pickled weights only, or weights that do not fit config.json.

    Warns of weights that are not used (heads other than the LM head), and of an LM head that config.json says is the
    embedding but whose values differ. As in transformers, that head is used.
    """
    settings = GPT2Settings.from_folder(folder)
    state, unused = _named(folder, read_safetensors(folder))
    if unused:
        warnings.warn(f"{folder}: these weights are not used: {', '.join(unused)}", stacklevel=3)
    shapes = expected_shapes(settings)
    head = state.get("lm_head.weight")
    if settings.tie_word_embeddings and head is not None:
        if torch.equal(head, state.get("transformer.wte.weight", head)):
            del state["lm_head.weight"]
        else:
            warnings.warn(
                f"{folder}: lm_head.weight and the embedding have different values, though config.json ties them "
                "(tie_word_embeddings); both are used as they are stored",
                stacklevel=3,
            )
    if not settings.tie_word_embeddings or "lm_head.weight" in state:
        shapes["lm_head.weight"] = shapes["transformer.wte.weight"]
    wrong = {
        "missing keys": sorted(set(shapes) - set(state)),
        "unexpected keys": sorted(set(state) - set(shapes)),
        "mismatched shapes": [
            f"{name} {list(state[name].shape)}, expected {list(shape)}"
            for name, shape in shapes.items()
            if name in state and tuple(state[name].shape) != shape
        ],
        "types that are not floating": [name for name, tensor in state.items() if not tensor.is_floating_point()],
    }
    if any(wrong.values()):
        problems = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"the weights in {folder} do not fit its config.json: {problems}")
    return settings, state


def _named(folder: Path, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Stored tensors by GPT2LMHeadModel's names, without causal masks; and the names of those that have no use here.

    Raises:
        ValueError: two tensors of one name, with and without the prefix "transformer.".
    """
    state: dict[str, Tensor] = {}
    unused = []
    for name, tensor in stored.items():
        if _OTHER_HEADS.fullmatch(name):
            unused.append(name)
        elif not name.endswith(_MASKS):
            full_name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if full_name in state:
                raise ValueError(f"{folder} holds both {full_name} and {full_name.removeprefix('transformer.')}")
            state[full_name] = tensor
    return state, unused


def expected_shapes(settings: GPT2Settings) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors except `lm_head.weight`, by GPT2LMHeadModel's names."""
    d, d_mlp = settings.n_embd, settings.d_mlp
    n_outputs = {"attn_c_attn": 3 * d, "mlp_c_fc": d_mlp}  # of the matrices whose outputs are not d
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (settings.vocab_size, d),
        "transformer.wpe.weight": (settings.n_positions, d),
        "transformer.ln_f.weight": (d,),
        "transformer.ln_f.bias": (d,),
    }
    for layer in range(settings.n_layer):
        for module in (*_LAYER_NORMS, *_MATRICES):
            outputs = n_outputs.get(module, d)
            inputs = d_mlp if module == "mlp_c_proj" else d
            name = f"transformer.h.{layer}.{_dotted(module)}"
            shapes[f"{name}.weight"] = (inputs, outputs) if module in _MATRICES else (outputs,)
            shapes[f"{name}.bias"] = (outputs,)
    return shapes


def random_state(settings: GPT2Settings, seed: int) -> dict[str, Tensor]:
    """Random float32 weights under GPT2LMHeadModel's names, tied. Gains are not 1 and biases not 0, on purpose."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(settings).items():
        if name.endswith("wte.weight"):
            std, mean = 0.05, 0.0
        elif len(shape) == 1 and name.endswith("weight"):  # gains of layer norms
            std, mean = 0.1, 1.0
        elif len(shape) == 1 or name.endswith("wpe.weight"):
            std, mean = 0.02, 0.0
        else:  # keeps the variance of unit-normal inputs at about 1, so that every module of the block matters
            std, mean = shape[0] ** -0.5, 0.0
        state[name] = torch.randn(*shape, generator=generator).mul_(std).add_(mean)
    return state


def _dotted(module: str) -> str:
    """attn_c_attn -> attn.c_attn, ln_1 -> ln_1."""
    return module if module in _LAYER_NORMS else module.replace("_", ".", 1)
