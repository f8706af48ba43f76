"""Where a model's tensors may lie, and in which dtype."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating dtype by itself or by name; ValueError names those there are."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is not supported; expected {', '.join(DTYPES)}")
    return found


def check_device(device: torch.device | str) -> torch.device:
    """A device that is present; ValueError if it is unknown or not there."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {error}") from error
    return found
