"""GPT-2's weights as plain tensors: from a Hugging Face folder or hub name, or random."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GPT2Config

BUILTIN_FOLDER = Path(__file__).parent / "builtin" / "backbone"

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
"""Activation functions of the MLP by Hugging Face's names, and the form of GELU that they are."""

# Everything a backbone needs from a hub repository; pickled weights are never fetched.
_HUB_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)


class BlockWeights(NamedTuple):
    """One block. Matrices are [inputs, outputs], as in Hugging Face's GPT-2 files (its `Conv1D`)."""

    ln_1_weight: Tensor  # [d]
    ln_1_bias: Tensor
    attn_c_attn_weight: Tensor  # [d, 3 d]
    attn_c_attn_bias: Tensor
    attn_c_proj_weight: Tensor  # [d, d]
    attn_c_proj_bias: Tensor
    ln_2_weight: Tensor  # [d]
    ln_2_bias: Tensor
    mlp_c_fc_weight: Tensor  # [d, d_mlp]
    mlp_c_fc_bias: Tensor
    mlp_c_proj_weight: Tensor  # [d_mlp, d]
    mlp_c_proj_bias: Tensor


class GPT2Weights(NamedTuple):
    wte: Tensor  # [vocab, d]
    wpe: Tensor  # [context, d]
    blocks: tuple[BlockWeights, ...]
    ln_f_weight: Tensor  # [d]
    ln_f_bias: Tensor
    lm_head: Tensor  # [vocab, d], the same tensor as wte when tied


def assemble(state: Mapping[str, Tensor], n_layers: int, dtype: torch.dtype, device: torch.device) -> GPT2Weights:
    """Takes the tensors by GPT2LMHeadModel's names; `lm_head.weight` may be absent (tied)."""

    def take(name: str) -> Tensor:
        return state[name].detach().to(device, dtype)

    def block(layer: int) -> BlockWeights:
        # ln_1_weight is ln_1.weight, attn_c_attn_weight is attn.c_attn.weight
        names = (f"transformer.h.{layer}.{_dotted(field)}" for field in BlockWeights._fields)
        return BlockWeights(*map(take, names))

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


def fingerprint(state: Mapping[str, Tensor], config: GPT2Config) -> str:
    """sha256 over the weights cast to float16 in order of their names, and the settings that change what they compute.

    A float16 file and the float32 weights that it was made from have the same fingerprint.
    """
    settings = {
        "activation": ACTIVATIONS[config.activation_function],
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "n_head": config.n_head,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "scale_attn_weights": config.scale_attn_weights,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(state):
        if name == "lm_head.weight" and torch.equal(state[name], state["transformer.wte.weight"]):
            continue  # tied, whether or not the file repeats it
        half = state[name].detach().to("cpu", torch.float16).contiguous()
        digest.update(f"{name} {list(half.shape)}\n".encode())
        digest.update(half.numpy().data)
    return digest.hexdigest()


def find_folder(name_or_path: str) -> Path:
    """The folder of "builtin", of a path, or of a hub name (downloaded, or from the hub's local cache).

    Raises:
        FileNotFoundError: no such folder.
        ConnectionError: a hub name that is not cached, and the hub cannot be reached or does not have it.
    """
    if name_or_path == "builtin":
        if not (BUILTIN_FOLDER / "config.json").exists():
            raise FileNotFoundError(f"the builtin backbone is missing from this installation ({BUILTIN_FOLDER})")
        return BUILTIN_FOLDER
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise FileNotFoundError(f"backbone folder {name_or_path!r} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(_HUB_FILES)))
    except HFValidationError as error:
        raise FileNotFoundError(f"backbone {name_or_path!r} is neither a folder nor a hub name: {error}") from error
    except Exception as error:  # the hub's client raises its own, httpx's and OS errors alike
        raise ConnectionError(
            f"backbone {name_or_path!r} is no folder here, and could not be had from the Hugging Face hub: it is not "
            f"in the local cache, and the hub is offline from here or has no such model ({type(error).__name__}). "
            "Download it where there is a network, and give the folder's path."
        ) from error


def read_folder(folder: Path) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Reads config.json and safetensors weights through transformers, as float32 under GPT2LMHeadModel's names.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: not a GPT-2, pickled weights only, or weights that do not fit config.json.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: expected a Hugging Face GPT-2 folder")
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type != "gpt2":
        raise ValueError(f"{folder} holds a model of type {model_type!r}; only 'gpt2' is supported")
    if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
            raise ValueError(
                f"{folder} has pickled weights (pytorch_model.bin) but no model.safetensors. Pickles can run code when "
                "they are read, so they are refused: convert them with transformers' save_pretrained()."
            )
        raise FileNotFoundError(f"{folder} has no model.safetensors")

    from safetensors import SafetensorError
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    config = GPT2Config.from_pretrained(folder)
    check_config(config)
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = GPT2LMHeadModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,  # holds float16 and bfloat16 files exactly
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{folder} has a model.safetensors that cannot be read (truncated?): {error}") from error
    except RuntimeError as error:  # shapes that do not fit
        raise ValueError(f"the weights in {folder} do not fit its config.json: {error}") from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    model, info = loaded
    # transformers fills missing weights with random numbers; here that is an error.
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    if any(wrong.values()):
        found = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"the weights in {folder} do not fit its config.json: {found}")
    return config, dict(model.state_dict(keep_vars=True))


def check_config(config: GPT2Config) -> None:
    """Raises ValueError for settings of GPT-2 that the forward pass does not compute."""
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"activation_function {config.activation_function!r} is not supported; expected {', '.join(ACTIVATIONS)}"
        )
    if config.add_cross_attention:
        raise ValueError("add_cross_attention is not supported: the backbone is a decoder alone")


def random_state(config: GPT2Config, seed: int) -> dict[str, Tensor]:
    """Random float32 weights under GPT2LMHeadModel's names, tied; gains and biases are non-trivial on purpose."""
    generator = torch.Generator().manual_seed(seed)
    d, d_mlp = config.n_embd, config.n_inner or 4 * config.n_embd
    vectors = {"attn_c_attn": 3 * d, "mlp_c_fc": d_mlp}  # sizes of biases and gains that are not d
    matrices = {"attn_c_attn": (d, 3 * d), "attn_c_proj": (d, d), "mlp_c_fc": (d, d_mlp), "mlp_c_proj": (d_mlp, d)}

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(std).add_(mean)

    state = {
        "transformer.wte.weight": normal(config.vocab_size, d, std=0.05),
        "transformer.wpe.weight": normal(config.n_positions, d, std=0.02),
        "transformer.ln_f.weight": normal(d, std=0.1, mean=1.0),
        "transformer.ln_f.bias": normal(d, std=0.02),
    }
    for layer in range(config.n_layer):
        for field in BlockWeights._fields:
            part, _, kind = field.rpartition("_")
            if kind == "bias":
                tensor = normal(vectors.get(part, d), std=0.02)
            elif part in matrices:
                # Keeps the variance of unit-normal inputs at about 1, so that every part of the block matters.
                tensor = normal(*matrices[part], std=matrices[part][0] ** -0.5)
            else:
                tensor = normal(d, std=0.1, mean=1.0)
            state[f"transformer.h.{layer}.{_dotted(field)}"] = tensor
    return state


def _dotted(field: str) -> str:
    """attn_c_attn_weight -> attn.c_attn.weight, ln_1_bias -> ln_1.bias."""
    part, _, kind = field.rpartition("_")
    if part.startswith(("attn_", "mlp_")):
        part = part.replace("_", ".", 1)
    return f"{part}.{kind}"
