"""From the tensors of a file to a checked dictionary; shared by the formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.errors import DictionaryFormatError


def check_tensors(path: Path, found: Mapping[str, object], expected: Mapping[str, tuple[int, ...]]) -> None:
    """DictionaryFormatError unless every expected tensor is there, floating, finite and of its shape."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise DictionaryFormatError(f"{path}: missing {', '.join(missing)}; found {', '.join(map(str, found))}")
    for name, shape in expected.items():
        tensor = found[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DictionaryFormatError(f"{path}: {name} is {kind}, expected a floating-point tensor")
        if tuple(tensor.shape) != shape:
            raise DictionaryFormatError(f"{path}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        # aminmax lets NaN and infinity through without a mask as large as the weights.
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise DictionaryFormatError(f"{path}: {name} holds NaN or infinite values")


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file; DictionaryFormatError if it is absent, truncated or something else."""
    try:
        return load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DictionaryFormatError(f"{file}: cannot be read as safetensors: {error}") from error


def read_config(file: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file; DictionaryFormatError if it is absent or something else. `expected` names the kind."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DictionaryFormatError(f"{file}: cannot be read as JSON, expected {expected}: {error}") from error
    if not isinstance(config, dict):
        raise DictionaryFormatError(f"{file}: found a {type(config).__name__}, expected {expected}")
    return config


def integer(file: Path, config: Mapping[str, Any], key: str, *, minimum: int = 1) -> int:
    """A whole number of a configuration (8 or 8.0); DictionaryFormatError if it is absent, too small or no number."""
    value = config.get(key)
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(whole) is not int or whole < minimum:
        found = repr(value) if key in config else "absent"
        raise DictionaryFormatError(f"{file}: {key} is {found}, expected an integer, {minimum} or more")
    return whole


def build_dictionary(path: Path, **fields: Any) -> Dictionary:
    """`Dictionary(...)` whose complaints name the file."""
    try:
        return Dictionary(**fields)
    except ValueError as error:
        raise DictionaryFormatError(f"{path}: {error}") from error


def latent_bias_without_pre_bias(dictionary: Dictionary) -> Tensor:
    """The latent bias, float64 [n_latents], with which nothing need be subtracted before encoding."""
    return dictionary.latent_bias.double() - dictionary.encoder.double() @ dictionary.pre_bias.double()


def convert(tensor: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A contiguous tensor that does not share a mapped file."""
    converted = tensor.to(device=device, dtype=dtype).contiguous()
    return converted.clone() if converted.data_ptr() == tensor.data_ptr() else converted
