"""The devices and dtypes that a model may use."""

from __future__ import annotations

import os
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype, given as such or by name; ValueError lists the supported ones."""
    checked = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if checked is None or checked not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is not supported; expected {', '.join(DTYPES)}")
    return checked


def check_device(device: torch.device | str) -> torch.device:
    """A device that can be used; ValueError if it is unknown or absent."""
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {error}") from error
    return checked


def choose_device(name: str) -> torch.device:
    """The device with this name: "cpu", "cuda", "cuda:1", or "auto" for the first GPU, or the CPU if there is no GPU.

    Raises:
        ValueError: the name is "auto", and the machine has an NVIDIA GPU that PyTorch cannot use. Falling back to the
            CPU would be many times slower, without a word.
    """
    if name != "auto":
        return torch.device("cuda:0" if name == "cuda" else name)
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    if nvidia_gpus():
        raise ValueError(
            f"this machine has an NVIDIA GPU that PyTorch {torch.__version__} cannot use: {_why_no_cuda()}. "
            "Set device to cpu (--device cpu) to run without it"
        )
    return torch.device("cpu")


def nvidia_gpus(devices: Path = Path("/dev")) -> list[str]:
    """Names of the NVIDIA GPUs' device files; empty if CUDA_VISIBLE_DEVICES hides all GPUs from this process."""
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
