"""`saeserve tokenize`, `saeserve cache` and `saeserve pull` as they are called; what they do is tested elsewhere."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sae_runtime import Backbone
from sae_runtime.data.token_folder.reader import TokenFolder
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.cache import ActivationCache
from tests.sae_runtime.conftest import tiny_backbone_folder  # noqa: F401 (a fixture)
from tests.sae_runtime.dictionary.pull.file_server import FileServer, running

Saeserve = Callable[..., tuple[int, str, str]]


@pytest.fixture
def server() -> Iterator[FileServer]:
    yield from running()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(50)))
    return path


def test_tokenize(saeserve: Saeserve, text: Path, tmp_path: Path, tiny_backbone_folder: Path):  # noqa: F811
    out = tmp_path / "tokens"
    arguments = ("tokenize", str(text), "--out", str(out), "--backbone", str(tiny_backbone_folder))
    code, printed, _ = saeserve(*arguments, "--held-out-fraction", "0.2", "--no-append-end-of-text")
    assert code == 0
    assert f"Train on it: saeserve train --data {out}" in printed
    folder = TokenFolder(out)
    assert folder.n_documents("train") + folder.n_documents("held_out") == 50
    assert not folder.manifest.append_end_of_text
    code, printed, _ = saeserve("tokenize", "--check", str(out), "--json")
    assert code == 0
    assert json.loads(printed)["training documents"] == folder.n_documents("train")
    file = out / "train-00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, _, error = saeserve("tokenize", "--check", str(out))
    assert code == 1
    assert "train-00000.npy has sha256" in error
    code, _, error = saeserve(*arguments)
    assert code == 1
    assert "exists; remove it" in error


def test_tokenize_settings_come_from_a_file_and_flags(saeserve: Saeserve, text: Path, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"sources": [str(text)], "out": str(tmp_path / "out"), "shard_token": 3}))
    code, _, error = saeserve("tokenize", "--config", str(config))
    assert (code, "shard_token: no such setting" in error) == (2, True)
    code, _, error = saeserve("tokenize", "--out", "x")
    assert (code, "sources is not given" in error) == (2, True)
    code, _, error = saeserve("tokenize", str(tmp_path / "missing.jsonl"), "--out", str(tmp_path / "x"))
    assert (code, "no file, folder or data set" in error) == (1, True)


def test_cache(saeserve: Saeserve, tmp_path: Path):
    folder, site = tmp_path / "cache", Site.parse("0.resid_pre")
    backbone = Backbone.random(n_layers=1, d_model=8, n_heads=2)
    ActivationCache(folder, backbone, [site], dtype=torch.float32, max_bytes=10**9).put([[1]], {site: torch.ones(1, 8)})
    code, printed, _ = saeserve("cache", "list", str(folder), "--json")
    [group] = json.loads(printed)
    assert (code, group["site"], group["passes"], group["backbone"]) == (0, "0.resid_pre", 1, backbone.name)
    assert group["group"] in saeserve("cache", "list", str(folder))[1]
    code, _, error = saeserve("cache", "clear", str(folder), "another")
    assert (code, "has no group 'another'" in error) == (1, True)
    assert "Deleted 1 groups" in saeserve("cache", "clear", str(folder), group["group"])[1]
    assert not folder.exists()
    assert "No cached activations" in saeserve("cache", "list", str(folder))[1]


def test_pull(saeserve: Saeserve, server: FileServer, tmp_path: Path, tiny_backbone_folder: Path):  # noqa: F811
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
