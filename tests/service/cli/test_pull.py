"""`saeserve pull` as it is called; the library's tests cover downloads and conversions."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.sae_runtime.conftest import tiny_backbone_folder  # noqa: F401 (a fixture)
from tests.sae_runtime.dictionary.pull.file_server import FileServer, running

Saeserve = Callable[..., tuple[int, str, str]]


@pytest.fixture
def server() -> Iterator[FileServer]:
    yield from running()


def test_fetches_and_converts(saeserve: Saeserve, server: FileServer, tmp_path: Path, tiny_backbone_folder: Path):  # noqa: F811
    d_in, n = 16, 32
    state = {
        "pre_bias": torch.zeros(d_in),
        "latent_bias": torch.zeros(n),
        "encoder.weight": torch.randn(n, d_in),
        "decoder.weight": torch.randn(d_in, n),
        "activation": "ReLU",
    }
    torch.save(state, tmp_path / "1.pt")
    path = "/sparse-autoencoder/gpt2-small/resid_delta_mlp_v4/autoencoders/1.pt"
    server.put(path, (tmp_path / "1.pt").read_bytes())
    name = "openai/gpt2-small/resid_delta_mlp_v4/1"
    arguments = ("--openai-base", server.address, "--backbone", str(tiny_backbone_folder))
    code, printed, error = saeserve("pull", name, "--out", str(tmp_path / "d"), *arguments)
    assert (code, error) == (0, "")
    assert "1.resid_delta_mlp" in printed
    assert "nothing to compare with" in printed
    code, printed, _ = saeserve("pull", name, "--out", str(tmp_path / "e"), "--as", "mine", "--json", *arguments)
    assert (code, json.loads(printed)["name"], json.loads(printed)["license"]) == (0, "mine", "mit")
    code, _, error = saeserve("pull", "openai/gpt2-small/nothing/1", *arguments)
    assert (code, "OpenAI published" in error) == (1, True)
    server.put(path, b"", ("status", 403))
    code, _, error = saeserve("pull", name, "--out", str(tmp_path / "f"), *arguments)
    assert (code, "is not permitted" in error) == (1, True)
