"""From the tensors of a file to a checked dictionary; shared by the formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_runtime.autoencoder import Dictionary
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


def build_dictionary(path: Path, **fields: Any) -> Dictionary:
    """`Dictionary(...)` whose complaints name the file."""
    try:
        return Dictionary(**fields)
    except ValueError as error:
        raise DictionaryFormatError(f"{path}: {error}") from error


def convert(tensor: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A contiguous tensor that does not share a mapped file."""
    converted = tensor.to(device=device, dtype=dtype).contiguous()
    return converted.clone() if converted.data_ptr() == tensor.data_ptr() else converted
