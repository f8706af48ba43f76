"""Reads and checks the tensors of a file, and builds a dictionary from them; shared by the formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.json_object import parse_object
from sae_runtime.errors import DictionaryFormatError


def check_tensors(path: Path, tensors: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """DictionaryFormatError unless every tensor in `shapes` is present, floating, finite and of its shape."""
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise DictionaryFormatError(f"{path}: missing {', '.join(missing)}; found {', '.join(map(str, tensors))}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            kind = type(tensor).__name__
            if isinstance(tensor, Tensor):
                kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout)
            raise DictionaryFormatError(f"{path}: {name} is {kind}, expected a floating-point tensor")
        if tuple(tensor.shape) != shape:
            raise DictionaryFormatError(f"{path}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if not _is_finite(tensor):
            raise DictionaryFormatError(f"{path}: {name} holds NaN or infinite values")


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file; DictionaryFormatError if it is absent, truncated or of another kind."""
    try:
        return load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise DictionaryFormatError(f"{file}: cannot be read as safetensors: {error}") from error


def read_config(file: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file; DictionaryFormatError if absent or of another kind. `expected` names the kind."""
    try:
        return parse_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DictionaryFormatError(f"{file}: cannot be read as JSON, expected {expected}: {error}") from error


def integer(file: Path, config: Mapping[str, Any], key: str, *, minimum: int = 1) -> int:
    """A whole number in a configuration (8 or 8.0); DictionaryFormatError if it is absent, too small or not whole."""
    value = config.get(key)
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(whole) is not int or whole < minimum:
        actual = repr(value) if key in config else "absent"
        raise DictionaryFormatError(f"{file}: {key} is {actual}, expected an integer, {minimum} or more")
    return whole


def build_dictionary(path: Path, **fields: Any) -> Dictionary:
    """`Dictionary(**fields)`; what is wrong with it becomes a DictionaryFormatError that names the file."""
    for name, tensor in fields.items():
        if isinstance(tensor, Tensor) and not _is_finite(tensor):
            raise DictionaryFormatError(f"{path}: {name} overflows {tensor.dtype}; load it with a wider dtype")
    try:
        return Dictionary(**fields)
    except ValueError as error:
        raise DictionaryFormatError(f"{path}: {error}") from error


def _is_finite(tensor: Tensor) -> bool:
    # aminmax returns NaN and infinities, and needs no mask as large as the weights. It does not take 8-bit numbers.
    bounds = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax() if tensor.numel() else ()
    return all(bool(bound.isfinite()) for bound in bounds)


def latent_bias_without_pre_bias(dictionary: Dictionary) -> Tensor:
    """The latent bias b - W pre_bias, float64 [n_latents]: with it, encoding need not subtract the pre-bias."""
    return dictionary.latent_bias.double() - dictionary.encoder.double() @ dictionary.pre_bias.double()


def convert(tensor: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A contiguous tensor that does not share memory with `tensor`, which may be a mapped file."""
    converted = tensor.to(device=device, dtype=dtype).contiguous()
    return converted.clone() if converted.data_ptr() == tensor.data_ptr() else converted
