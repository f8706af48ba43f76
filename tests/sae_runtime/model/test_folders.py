"""Finding a model's folder, and reading its safetensors: what is accepted, and that all else is a clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from sae_runtime import Backbone
from sae_runtime.model import folders
from tests.sae_runtime.model.tiny_gpt2 import GOLDEN, same

pytestmark = pytest.mark.any_cpu


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Backbone.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Backbone.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub name"):
        Backbone.load("not a name!")


def test_builtin_is_a_folder_of_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backbone: Backbone
) -> None:
    monkeypatch.setattr(folders, "BACKBONE", GOLDEN)
    loaded = Backbone.load()
    assert loaded.name == "builtin"
    assert same(loaded, backbone)
    monkeypatch.setattr(folders, "BACKBONE", tmp_path)
    with pytest.raises(FileNotFoundError, match="builtin backbone is missing"):
        Backbone.load("builtin")


def test_hub_names_fetch_no_pickles(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(GOLDEN)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = Backbone.load("openai-community/gpt2")
    assert loaded.name == asked["name"] == "openai-community/gpt2"
    assert not [pattern for pattern in asked["allow_patterns"] if "bin" in pattern or pattern.endswith((".pt", "*"))]
    assert same(loaded, backbone)


def test_a_hub_name_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConnectionError, match=r"'gpt2'.*offline.*folder's path"):
        Backbone.load("gpt2")


def test_sharded_weights(tmp_path: Path, backbone: Backbone) -> None:
    GPT2LMHeadModel.from_pretrained(GOLDEN).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same(Backbone.load(str(tmp_path)), backbone)


def test_an_index_that_leads_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for text, message in (('{"weight_map": {"a": "../other.safetensors"}}', "other"), ("[]", "not an index")):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            Backbone.load(folder)


def test_pickles_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        Backbone.load(folder)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights.*save_pretrained"):
        Backbone.load(folder)


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Backbone.load(folder)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    """transformers would apply it."""
    shutil.copytree(GOLDEN, tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: .*adapter \(PEFT\)"):
        Backbone.load(tmp_path / "adapted")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "config.json", tmp_path / "config.json")
    state = load_file(GOLDEN / "model.safetensors")
    name = "transformer.ln_f.bias"
    save_file(state, tmp_path / "model-1.safetensors")
    save_file({name: state[name] + 1}, tmp_path / "model-2.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model-1.safetensors") | {name: "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-2\.safetensors holds transformer\.ln_f\.bias, which another file"):
        Backbone.load(tmp_path)
