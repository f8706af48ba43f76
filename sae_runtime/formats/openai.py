"""OpenAI's `sparse_autoencoder` files (github.com/openai/sparse_autoencoder, commit 4965b94).

A `torch.save`d state dict: pre_bias [d], latent_bias [n], encoder.weight [n, d], decoder.weight [d, n] (of any memory
layout), activation (a class name; any other than TopK and Identity means ReLU) and activation_state_dict (TopK: k,
postact_fn). The input is layer-normalised exactly when the activation is TopK. Other keys are ignored.
"""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sae_runtime.autoencoder import Dictionary
from sae_runtime.errors import DictionaryFormatError
from sae_runtime.formats.weights import build_dictionary, check_tensors, convert
from sae_runtime.sites import LOCATIONS

EXPECTED = "OpenAI's sparse_autoencoder state dict (encoder.weight, decoder.weight, pre_bias, latent_bias, activation)"
# Published as gpt2-small/{location}{suffix}/autoencoders/{layer}.pt, the suffix empty, _v4, _v5_32k or _v5_128k.
_PUBLISHED_PATH = re.compile(rf"({'|'.join(LOCATIONS)})(_v\d+\w*)?/autoencoders/(\d+)\.pt$")


def load_openai(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    site: str | None = None,
) -> Dictionary:
    """A dictionary from OpenAI's .pt file. The file does not say its site: give it, or keep the published path.

    DictionaryFormatError says what is wrong with the file; code pickled into it is refused, not run.
    """
    path = Path(path)
    state = _read(path)
    encoder = state.get("encoder.weight")
    if not isinstance(encoder, Tensor) or encoder.ndim != 2:
        found = (
            list(encoder.shape) if isinstance(encoder, Tensor) else f"the keys {', '.join(map(str, state)) or 'none'}"
        )
        raise DictionaryFormatError(f"{path}: found {found}, expected encoder.weight [n_latents, d_in] of {EXPECTED}")
    n_latents, d_in = encoder.shape
    expected = {
        "encoder.weight": (n_latents, d_in),
        "decoder.weight": (d_in, n_latents),
        "pre_bias": (d_in,),
        "latent_bias": (n_latents,),
    }
    check_tensors(path, state, expected)
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
        normalize=activation == "topk",
        postact=postact,
        site=site,
        name=path.stem if published is None else f"{published[1]}{published[2] or ''}-{published[3]}",
    )


def save_openai(dictionary: Dictionary, path: str | os.PathLike[str]) -> None:
    """Write a dictionary as OpenAI's .pt file, float32; atomic (a temporary file beside it, then renamed).

    ValueError for what the format cannot say: TopK without input normalisation, ReLU with it.
    """
    if dictionary.normalize != (dictionary.activation == "topk"):
        raise ValueError("OpenAI's format normalises the input exactly when the activation is TopK; this one differs")
    path = Path(path)
    names = {"relu": "ReLU", "identity": "Identity"}
    topk = {"k": dictionary.k, "postact_fn": names[dictionary.postact]} if dictionary.activation == "topk" else {}

    def stored(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device="cpu", dtype=torch.float32)

    state = {
        "pre_bias": stored(dictionary.pre_bias),
        "latent_bias": stored(dictionary.latent_bias),
        "stats_last_nonzero": torch.zeros(dictionary.n_latents, dtype=torch.int64),
        "encoder.weight": stored(dictionary.encoder),
        "decoder.weight": stored(dictionary.decoder).T.contiguous(),
        "activation": "TopK" if topk else "ReLU",
        "activation_state_dict": topk,
    }
    statistics = dictionary.statistics
    if statistics is not None:
        state["latents_activation_frequency"] = stored(statistics.firing_rate)
        state["latents_mean_square"] = stored(statistics.mean_square)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path) -> Mapping[str, Any]:
    try:
        # Mapping needs the zip container that torch has written since 1.6; older files are read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise DictionaryFormatError(
            f"{path}: not plain tensors, so it was not loaded (code in it was not run); expected {EXPECTED}: {reason}"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError and others on damaged files
        size = path.stat().st_size if path.is_file() else "no"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DictionaryFormatError(
            f"{path}: found {size} bytes that do not read as {EXPECTED}; truncated or another format? {reason}"
        ) from error
    if not isinstance(state, Mapping):
        raise DictionaryFormatError(f"{path}: found a {type(state).__name__}, expected {EXPECTED}")
    return state


def _activation(
    path: Path, state: Mapping[str, Any]
) -> tuple[Literal["topk", "relu"], int | None, Literal["relu", "identity"]]:
    name = state.get("activation", "ReLU")
    if name == "Identity":
        raise DictionaryFormatError(f"{path}: activation is Identity, whose latents are dense; expected TopK or ReLU")
    if name != "TopK":  # their loader takes ReLU for every name it does not know
        return "relu", None, "relu"
    options = state.get("activation_state_dict")
    k = options.get("k") if isinstance(options, Mapping) else None
    if not isinstance(k, int) or isinstance(k, bool):
        raise DictionaryFormatError(f"{path}: TopK with activation_state_dict {options!r}, expected an integer k in it")
    postact = options.get("postact_fn", "ReLU") if isinstance(options, Mapping) else "ReLU"
    if postact not in ("ReLU", "Identity"):
        raise DictionaryFormatError(f"{path}: postact_fn is {postact!r}, expected ReLU or Identity")
    return "topk", k, "relu" if postact == "ReLU" else "identity"
