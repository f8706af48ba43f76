"""Where a model's tensors may lie, and in which dtype."""

from __future__ import annotations

import os
from pathlib import Path

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


def choose_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", or "auto", which is the first GPU, or the CPU where there is none.

    Raises:
        ValueError: the name is auto, and there is an NVIDIA GPU that PyTorch cannot use. The CPU would be many times
            slower, which nobody should find out by measuring.
    """
    if name != "auto":
        return torch.device("cuda:0" if name == "cuda" else name)
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    if nvidia_gpus():
        raise ValueError(
            f"this machine has an NVIDIA GPU that PyTorch {torch.__version__} cannot use: {_why_no_cuda()}. "
            "Set device to cpu (--device cpu) to go on without it"
        )
    return torch.device("cpu")


def nvidia_gpus(devices: Path = Path("/dev")) -> list[str]:
    """Device files of the NVIDIA GPUs that this process may see; none if CUDA_VISIBLE_DEVICES hides them all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return []
    return sorted(path.name for path in devices.glob("nvidia[0-9]*"))


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "it is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return f"CUDA {torch.version.cuda} finds no device"
