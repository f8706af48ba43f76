"""OpenAI's `sparse_autoencoder` files (github.com/openai/sparse_autoencoder, commit 4965b94).

A state dict written by `torch.save`: pre_bias [d], latent_bias [n], encoder.weight [n, d], decoder.weight [d, n] (any
memory layout), activation (a class name; any name but TopK and Identity means ReLU) and activation_state_dict (TopK: k,
postact_fn). The input is layer-normalised if and only if the activation is TopK. stats_last_nonzero,
latents_activation_frequency, latents_mean_square, activation.k and activation.postact_fn are not used; a file with
other keys is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sae_runtime.atomic import atomic_file
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats.keys import check_keys
from sae_runtime.dictionary.formats.origin import Origin
from sae_runtime.dictionary.formats.torch_file import read_torch_file
from sae_runtime.dictionary.formats.weights import (
    build_dictionary,
    check_tensors,
    convert,
    latent_bias_without_pre_bias,
)
from sae_runtime.errors import DictionaryFormatError
from sae_runtime.model.sites import LOCATIONS

EXPECTED = "OpenAI's sparse_autoencoder state dict (encoder.weight, decoder.weight, pre_bias, latent_bias, activation)"
_UNUSED = (
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
    "activation.k",
    "activation.postact_fn",
)
# Published as gpt2-small/{location}{suffix}/autoencoders/{layer}.pt, the suffix empty, _v4, _v5_32k or _v5_128k.
_PUBLISHED_PATH = re.compile(rf"({'|'.join(LOCATIONS)})(_v\d+\w*)?/autoencoders/(\d+)\.pt$")


def load_openai(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    site: str | None = None,
    state: Mapping[str, Any] | None = None,
) -> Dictionary:
    """A dictionary from OpenAI's .pt file. The file does not name its site: give it, or keep the published path.

    `state` is the file's content, if it was read before.

    Raises:
        DictionaryFormatError: the file is wrong (says how), or holds pickled code, which is not run.
    """
    path = Path(path)
    state = read_torch_file(path, EXPECTED) if state is None else state
    encoder = state.get("encoder.weight")
    if not isinstance(encoder, Tensor) or encoder.ndim != 2:
        actual = (
            list(encoder.shape) if isinstance(encoder, Tensor) else f"the keys {', '.join(map(str, state)) or 'none'}"
        )
        raise DictionaryFormatError(f"{path}: found {actual}, expected encoder.weight [n_latents, d_in] of {EXPECTED}")
    n_latents, d_in = encoder.shape
    expected = {
        "encoder.weight": (n_latents, d_in),
        "decoder.weight": (d_in, n_latents),
        "pre_bias": (d_in,),
        "latent_bias": (n_latents,),
    }
    check_tensors(path, state, expected)
    check_keys(path, state, {*expected, "activation", "activation_state_dict", *_UNUSED})
    activation, k, postact = _activation(path, state)
    published = _PUBLISHED_PATH.search(path.resolve().as_posix())
    if site is None and published is not None:
        site = f"{int(published[3])}.{published[1]}"
    return build_dictionary(
        path,
        encoder=convert(encoder, dtype, device),
        decoder=convert(state["decoder.weight"].T, dtype, device),
        pre_bias=convert(state["pre_bias"], dtype, device),
        latent_bias=convert(state["latent_bias"], dtype, device),
        activation=activation,
        k=k,
        normalization="layer_norm" if activation == "topk" else "none",
        postact=postact,
        site=site,
        name=path.stem if published is None else f"{published[1]}{published[2] or ''}-{published[3]}",
        origin=Origin("openai", model=None if published is None else "gpt2-small"),
    )


def save_openai(dictionary: Dictionary, path: str | os.PathLike[str]) -> None:
    """Writes a dictionary as OpenAI's .pt file in float32. The file appears complete or not at all.

    The format has one bias for both ends. If the dictionary adds another bias after decoding than it subtracts before
    encoding, the added one is stored, and latent_bias makes up for the difference.

    Raises:
        ValueError: the format cannot express the dictionary: an activation other than topk and relu, topk without layer
            norm, relu with a normalisation, a skip connection, or a transcoder.
    """
    inexpressible = {
        f"the activation {dictionary.activation}": dictionary.activation not in ("topk", "relu"),
        f"{dictionary.activation} with normalization {dictionary.normalization}": dictionary.normalization
        != ("layer_norm" if dictionary.activation == "topk" else "none"),
        "a skip connection": dictionary.skip is not None,
        "a transcoder": dictionary.transcoder,
    }
    if present := [name for name, is_present in inexpressible.items() if is_present]:
        possible = "it has topk with layer_norm and relu without normalisation"
        raise ValueError(f"OpenAI's format cannot express {' and '.join(present)}; {possible}")
    pre_bias, latent_bias = dictionary.pre_bias, dictionary.latent_bias
    if dictionary.output_bias is not None:
        pre_bias = dictionary.output_bias
        shift = dictionary.encoder.double() @ pre_bias.double()
        latent_bias = latent_bias_without_pre_bias(dictionary) + shift
    names = {"relu": "ReLU", "identity": "Identity"}
    topk = {"k": dictionary.k, "postact_fn": names[dictionary.postact]} if dictionary.activation == "topk" else {}

    def stored(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device="cpu", dtype=torch.float32)

    state = {
        "pre_bias": stored(pre_bias),
        "latent_bias": stored(latent_bias),
        "stats_last_nonzero": torch.zeros(dictionary.n_latents, dtype=torch.int64),
        "encoder.weight": stored(dictionary.encoder),
        "decoder.weight": stored(dictionary.decoder).T.contiguous(),
        "activation": "TopK" if topk else "ReLU",
        "activation_state_dict": topk,
    }
    # OpenAI's loader requires these two. If they are unknown, they are those of its untrained autoencoder.
    n_latents, statistics = dictionary.n_latents, dictionary.statistics
    state["latents_activation_frequency"] = (
        torch.ones(n_latents) if statistics is None else stored(statistics.firing_rate)
    )
    state["latents_mean_square"] = torch.zeros(n_latents) if statistics is None else stored(statistics.mean_square)
    with atomic_file(Path(path)) as file:
        torch.save(state, file)


def _activation(
    path: Path, state: Mapping[str, Any]
) -> tuple[Literal["topk", "relu"], int | None, Literal["relu", "identity"]]:
    name = state.get("activation", "ReLU")
    options = state.get("activation_state_dict") or {}
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise DictionaryFormatError(
            f"{path}: activation is {name!r} and activation_state_dict {options!r}, expected a name and a mapping"
        )
    if name == "Identity":
        raise DictionaryFormatError(f"{path}: activation is Identity, whose latents are dense; expected TopK or ReLU")
    check_keys(path, options, ("k", "postact_fn") if name == "TopK" else (), where="activation_state_dict.")
    if name != "TopK":  # OpenAI's loader takes every name it does not know for ReLU
        return "relu", None, "relu"
    k = options.get("k")
    if not isinstance(k, int) or isinstance(k, bool):
        raise DictionaryFormatError(f"{path}: TopK with activation_state_dict {options!r}, expected an integer k in it")
    postact = options.get("postact_fn", "ReLU")
    if postact not in ("ReLU", "Identity"):
        raise DictionaryFormatError(f"{path}: postact_fn is {postact!r}, expected ReLU or Identity")
    return "topk", k, "relu" if postact == "ReLU" else "identity"
