"""dictionary_learning's folders (github.com/saprmarks/dictionary_learning, 0.1.0, commit 60ec6bf): ae.pt, config.json.

ae.pt is a torch.saved state dict; config.json names its class under trainer.dict_class. With W_enc as it is stored:

    AutoEncoder             relu(x - bias), reconstruction + bias
    AutoEncoderNew          relu(x), reconstruction + decoder.bias; its trainer writes dict_class "AutoEncoder" as well
    GatedAutoEncoder        gated (x - decoder_bias), reconstruction + decoder_bias
    AutoEncoderTopK         top k of relu(x - b_dec); a threshold in the file is not used
    BatchTopKSAE, MatryoshkaBatchTopKSAE   relu(x - b_dec) above one threshold; one below 0 was never set: plain ReLU
    JumpReluAutoEncoder     JumpReLU of x, from which b_dec is not subtracted; reconstruction + b_dec

The ae.pt of a stopped run holds {step, ae, optimizer, config, norm_factor}. Then `ae` is read. If the run divided its
activations by norm_factor, the biases are multiplied by it, as the project does when a run ends.

Weights are read as written. The project's own loader divides the decoder columns of an AutoEncoder by their norms and
multiplies encoder and biases by them. That scales the latents by these norms and leaves reconstructions unchanged.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats.keys import check_keys, key_set
from sae_runtime.dictionary.formats.origin import Origin
from sae_runtime.dictionary.formats.torch_file import read_torch_file
from sae_runtime.dictionary.formats.weights import build_dictionary, check_tensors, convert, read_config
from sae_runtime.errors import DictionaryFormatError

WEIGHTS_FILE = "ae.pt"
CONFIG_FILE = "config.json"
EXPECTED = f"dictionary_learning's {WEIGHTS_FILE} (a state dict) with its {CONFIG_FILE} beside it"
_TOPK_KEYS = {
    "encoder": "encoder.weight",
    "decoder": "decoder.weight",
    "pre_bias": "b_dec",
    "latent_bias": "encoder.bias",
}
_FLAT_KEYS = {"encoder": "W_enc", "decoder": "W_dec", "pre_bias": "b_dec", "latent_bias": "b_enc"}
# class -> our tensor: key in the file; "output_bias" where the bias is not subtracted before encoding
_KEYS: dict[str, dict[str, str]] = {
    "AutoEncoder": _TOPK_KEYS | {"pre_bias": "bias"},
    "AutoEncoderNew": {name: key for name, key in _TOPK_KEYS.items() if name != "pre_bias"}
    | {"output_bias": "decoder.bias"},
    "GatedAutoEncoder": _TOPK_KEYS
    | {
        "pre_bias": "decoder_bias",
        "latent_bias": "gate_bias",
        "magnitude_scale": "r_mag",
        "magnitude_bias": "mag_bias",
    },
    "AutoEncoderTopK": _TOPK_KEYS,
    "BatchTopKSAE": _TOPK_KEYS,
    "MatryoshkaBatchTopKSAE": _FLAT_KEYS,
    "JumpReluAutoEncoder": {name: key for name, key in _FLAT_KEYS.items() if name != "pre_bias"}
    | {"output_bias": "b_dec", "threshold": "threshold"},
}
# Tells the class when there is no config.json, except AutoEncoderTopK from BatchTopKSAE, whose keys are the same.
_CLASS_OF_KEYS = {
    frozenset(keys.values()): name for name, keys in _KEYS.items() if name not in ("AutoEncoderTopK", "BatchTopKSAE")
} | {frozenset({*_FLAT_KEYS.values(), "k", "threshold", "group_sizes"}): "MatryoshkaBatchTopKSAE"}
# What the project's trainers and buffers have recorded, in all versions; none of it is needed to encode.
_RECORDED = key_set(
    """
    activation_dim activation_queue_length adaptive_sparsity_penalty anneal_start auxk_alpha bandwidth decay_start
    device dict_class dict_size gp_reg_coeff group_fractions group_sizes group_weights k l0_penalty l1_penalty
    lambda_warm_steps layer lm_name lr n_sparsity_updates p_end p_start resample_steps seed sparsity_coefficient
    sparsity_function sparsity_loss_queue_length sparsity_penalty sparsity_queue_length sparsity_warmup_steps steps
    steps_before_annealing submodule_name target_l0 threshold_beta threshold_start_step top_k_aux trainer_class
    wandb_name warmup_steps weights_temperature
    """
)
_BUFFER = ("d_submodule", "io", "n_ctxs", "ctx_len", "refresh_batch_size", "out_batch_size", "device", "layer")
_SCALED = ("pre_bias", "output_bias", "latent_bias", "magnitude_bias", "threshold")


def load_dictionary_learning(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    state: Mapping[str, Any] | None = None,
) -> Dictionary:
    """A dictionary from a folder with ae.pt, or from that file. `state` is the file's content, if it was read before.

    Raises:
        DictionaryFormatError: the files are wrong (says how), or hold pickled code, which is not run.
    """
    path = Path(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    state = read_torch_file(file, EXPECTED) if state is None else state
    norm_factor = 1.0
    if isinstance(state.get("ae"), Mapping):  # a backup that was saved during a run
        norm_factor = 1.0 if state.get("norm_factor") is None else _scalar(file, state, "norm_factor")
        if not 0 < norm_factor < math.inf:
            raise DictionaryFormatError(f"{file}: norm_factor is {norm_factor}, expected a positive number")
        state = state["ae"]
    config_file = file.parent / CONFIG_FILE
    config = read_config(config_file, EXPECTED) if config_file.is_file() else {}
    trainer = config.get("trainer", config)
    if not isinstance(trainer, Mapping):
        raise DictionaryFormatError(f"{config_file}: trainer is {trainer!r}, expected an object with dict_class")
    if trainer is not config:
        check_keys(config_file, config, ("trainer", "buffer"))
    check_keys(config_file, trainer, _RECORDED | {"buffer"} if trainer is config else _RECORDED, where="trainer.")
    buffer = config.get("buffer") or {}
    if not isinstance(buffer, Mapping):
        raise DictionaryFormatError(f"{config_file}: buffer is {buffer!r}, expected an object")
    check_keys(config_file, buffer, _BUFFER, where="buffer.")
    if (io := buffer.get("io", "out")) not in ("out", "in", "in_and_out"):
        raise DictionaryFormatError(f"{config_file}: buffer.io is {io!r}, expected out, in or in_and_out")
    kind = _class(file, state, trainer)
    tensors = _tensors(file, state, kind, norm_factor, dtype, device)
    activation = _activation(file, state, trainer, kind)
    if (threshold := activation.pop("threshold", None)) is not None:
        filled = torch.full_like(tensors["latent_bias"], threshold * norm_factor)
        tensors["threshold"] = filled
    return build_dictionary(
        file,
        **tensors,
        **activation,
        transcoder=io == "in_and_out",  # trained to give the module's output from its input
        site=_site(trainer) if io == "out" else None,
        name=file.parent.name if file.name == WEIGHTS_FILE else file.stem,
        origin=Origin.of(
            "dictionary_learning",
            hook=trainer.get("submodule_name"),
            model=trainer.get("lm_name"),
            context_length=buffer.get("ctx_len"),
            config=config,
        ),
    )


def _class(file: Path, state: Mapping[str, Any], trainer: Mapping[str, Any]) -> str:
    by_keys = _CLASS_OF_KEYS.get(frozenset(state))
    name = trainer.get("dict_class", by_keys)
    if name == "AutoEncoder" and by_keys == "AutoEncoderNew":
        return by_keys
    if name is None:
        keys = ", ".join(map(str, state)) or "none"
        raise DictionaryFormatError(
            f"{file}: no trainer.dict_class in {CONFIG_FILE}, and the keys {keys} leave the class open; "
            f"expected {EXPECTED}"
        )
    if not isinstance(name, str) or name not in _KEYS:
        raise DictionaryFormatError(f"{file}: dict_class is {name!r}, expected one of {', '.join(_KEYS)}")
    return name


def _tensors(
    file: Path, state: Mapping[str, Any], kind: str, norm_factor: float, dtype: torch.dtype, device: str | torch.device
) -> dict[str, Tensor]:
    keys = _KEYS[kind]
    flat = keys["encoder"] == "W_enc"  # [d, n] and [n, d]; the others are linear layers, [n, d] and [d, n]
    encoder = state.get(keys["encoder"])
    if not isinstance(encoder, Tensor) or encoder.ndim != 2:
        actual = f"shape {list(encoder.shape)}" if isinstance(encoder, Tensor) else f"keys {', '.join(map(str, state))}"
        raise DictionaryFormatError(f"{file}: found {actual}, expected {keys['encoder']} [n, d] or [d, n] of a {kind}")
    n_latents, d_in = reversed(encoder.shape) if flat else encoder.shape
    d_by_n, n_by_d = (d_in, n_latents), (n_latents, d_in)
    shapes: dict[str, tuple[int, ...]] = {
        keys["encoder"]: d_by_n if flat else n_by_d,
        keys["decoder"]: n_by_d if flat else d_by_n,
    }
    for name, key in keys.items():
        if name not in ("encoder", "decoder"):
            shapes[key] = (d_in,) if name in ("pre_bias", "output_bias") else (n_latents,)
    check_tensors(file, state, shapes)
    check_keys(file, state, {*shapes, "k", "threshold", "group_sizes"})
    tensors = {}
    for name, key in keys.items():
        transposed = (name == "encoder") if flat else (name == "decoder")
        tensor = state[key].T if transposed else state[key]
        if name == "magnitude_scale":
            tensor = tensor.double().exp()
        tensors[name] = convert(tensor * norm_factor if name in _SCALED else tensor, dtype, device)
    tensors.setdefault("pre_bias", torch.zeros(d_in, dtype=dtype, device=device))
    return tensors


def _activation(file: Path, state: Mapping[str, Any], trainer: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The dictionary's `activation` and `k`, and a threshold if all latents share one."""
    if kind == "AutoEncoderTopK":
        source = state if "k" in state else trainer  # files of older versions hold no k
        if not (k := _scalar(file, source, "k")).is_integer():
            raise DictionaryFormatError(f"{file}: k is {k}, expected an integer")
        return {"activation": "topk", "k": int(k)}
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = _scalar(file, state, "threshold")
        return {"activation": "relu"} if threshold <= 0 else {"activation": "jumprelu", "threshold": threshold}
    families = {"JumpReluAutoEncoder": "jumprelu", "GatedAutoEncoder": "gated"}
    return {"activation": families.get(kind, "relu")}


def _scalar(file: Path, state: Mapping[str, Any], key: str) -> float:
    value = state.get(key)
    if isinstance(value, Tensor) and value.numel() == 1 and bool(value.isfinite().all()):
        return float(value.item())
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    actual = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise DictionaryFormatError(f"{file}: {key} is {actual}, expected one number")


def _site(trainer: Mapping[str, Any]) -> str | None:
    """The site, if its name is the one in the project's own examples; the project lets users write any text."""
    match = re.fullmatch(r"resid_post_layer_(\d+)", str(trainer.get("submodule_name")))
    return f"{int(match[1])}.resid_post_mlp" if match else None
