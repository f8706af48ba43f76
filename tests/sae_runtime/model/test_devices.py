"""The device that a name stands for, on machines with and without GPUs that PyTorch can use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_runtime.model import devices
from sae_runtime.model.devices import choose_device, nvidia_gpus


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the machine has, and what PyTorch can use of it."""

    def make(*, gpus: int, usable: bool, cuda: str | None = "12.8") -> None:
        monkeypatch.setattr(devices, "nvidia_gpus", lambda: [f"nvidia{i}" for i in range(gpus)])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return make


def test_auto_is_the_first_gpu_or_the_cpu_where_there_is_none(machine: Callable[..., None]) -> None:
    machine(gpus=2, usable=True)
    assert choose_device("auto") == torch.device("cuda:0")
    machine(gpus=0, usable=False)
    assert choose_device("auto") == torch.device("cpu")


def test_a_gpu_that_pytorch_cannot_use_is_an_error(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def old_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update.")

    machine(gpus=1, usable=False)
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    with pytest.raises(ValueError, match=r"too old \(found version 11040\)\. Set device to cpu \(--device cpu\)"):
        choose_device("auto")
    machine(gpus=1, usable=False, cuda=None)
    with pytest.raises(ValueError, match=r"an NVIDIA GPU that PyTorch .* cannot use: it is built without CUDA"):
        choose_device("auto")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("name", "device"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_other_names_are_taken_at_their_word(machine: Callable[..., None], name: str, device: str) -> None:
    machine(gpus=1, usable=False)
    assert choose_device(name) == torch.device(device)


def test_gpus_are_seen_by_their_device_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert nvidia_gpus(tmp_path) == ["nvidia0", "nvidia1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert nvidia_gpus(tmp_path) == ["nvidia0", "nvidia1"]
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert nvidia_gpus(tmp_path) == []
