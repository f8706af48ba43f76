"""Reading Hugging Face folders: what is accepted, and that everything else is a clear error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sae_runtime import Backbone
from sae_runtime.model import folders
from sae_runtime.model.families.gpt2.config import GPT2Settings
from tests import golden

pytestmark = pytest.mark.any_cpu

GOLDEN = golden.FOLDER / "hooks_gpt2_tiny"
IDS = torch.tensor([[1, 2, 3, 4, 5]])
SITE = "2.resid_post_mlp"


@pytest.fixture(scope="module")
def golden() -> Backbone:
    return Backbone.load(GOLDEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden model that a test may change."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    return tmp_path


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(found: Backbone, expected: Backbone) -> bool:
    a, b = found.activations(IDS, sites=[SITE]), expected.activations(IDS, sites=[SITE])
    return torch.equal(a[SITE], b[SITE]) and found.fingerprint == expected.fingerprint


def test_names_without_prefix_and_mask_buffers(folder: Path, golden: Backbone) -> None:
    """openai-community/gpt2's file: `h.0.attn.c_attn.weight` and causal masks `h.0.attn.bias`."""

    def as_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
        return plain | masks

    rewrite_weights(folder, as_published)
    assert "h.0.ln_1.weight" in load_file(folder / "model.safetensors")
    assert same(Backbone.load(folder), golden)


def test_the_golden_file_has_prefixes_and_no_head(golden: Backbone) -> None:
    names = load_file(GOLDEN / "model.safetensors").keys()
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    assert (golden.n_layers, golden.d_model, golden.context_length, golden.vocab_size) == (3, 32, 64, 120)
    assert golden.name == str(GOLDEN)


def test_sharded_weights(tmp_path: Path, golden: Backbone) -> None:
    GPT2LMHeadModel.from_pretrained(GOLDEN).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same(Backbone.load(str(tmp_path)), golden)


def test_a_repeated_tied_head_changes_nothing(folder: Path, golden: Backbone) -> None:
    rewrite_weights(folder, lambda state: state | {"lm_head.weight": state["transformer.wte.weight"].clone()})
    assert same(Backbone.load(folder), golden)


def test_float16_files_have_the_fingerprint_of_the_float32_weights(folder: Path, golden: Backbone) -> None:
    rewrite_weights(folder, lambda state: {name: tensor.half() for name, tensor in state.items()})
    half = Backbone.load(folder)
    assert half.dtype == torch.float32
    assert half.fingerprint == golden.fingerprint
    found, expected = (backbone.activations(IDS, sites=[SITE])[SITE] for backbone in (half, golden))
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()


def test_the_fingerprint_sees_weights_and_settings(folder: Path, golden: Backbone) -> None:
    rewrite_config(folder, n_head=8)
    assert Backbone.load(folder).fingerprint != golden.fingerprint
    rewrite_config(folder, n_head=4, activation_function="gelu_pytorch_tanh")  # another name of gelu_new
    assert Backbone.load(folder).fingerprint == golden.fingerprint
    rewrite_weights(folder, lambda state: state | {"transformer.ln_f.bias": state["transformer.ln_f.bias"] + 0.01})
    assert Backbone.load(folder).fingerprint != golden.fingerprint


def test_pickles_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        Backbone.load(folder)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights.*save_pretrained"):
        Backbone.load(folder)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("transformer.h.1.mlp.c_fc.bias"), r"missing keys: transformer\.h\.1\.mlp\.c_fc\.bias"),
        (lambda state: state | {"transformer.h.0.extra": torch.zeros(2)}, "unexpected keys.*extra"),
        (
            lambda state: state | {"transformer.wpe.weight": torch.zeros(3, 32)},
            r"do not fit.*wpe\.weight \[3, 32\], expected \[64, 32\]",
        ),
        (lambda state: state | {"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}, "not floating.*ln_f"),
    ],
)
def test_weights_that_do_not_fit_the_config(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    rewrite_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        Backbone.load(folder)


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Backbone.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama'.*only 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_head": 5}, "not a multiple of n_head 5"),
        ({"n_layer": "3"}, "n_layer is '3'"),
        ({"tie_word_embeddings": False}, r"missing keys: lm_head\.weight"),
    ],
)
def test_other_models_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        Backbone.load(folder)


def test_settings_are_what_transformers_reads(folder: Path, golden: Backbone) -> None:
    """Also under transformers' other names, and with its defaults where config.json is silent."""
    values = json.loads((folder / "config.json").read_text())
    values = {name: value for name, value in values.items() if name != "n_embd" and name != "layer_norm_epsilon"}
    (folder / "config.json").write_text(json.dumps(values | {"hidden_size": 32}))
    expected = GPT2Config.from_pretrained(folder)
    for settings in (Backbone.load(folder).settings, golden.settings):
        for name, value in asdict(settings).items():
            assert value == getattr(expected, name), name
    assert asdict(GPT2Settings.from_mapping(golden.config.to_dict())) == asdict(golden.settings)
    assert asdict(GPT2Settings()) == {name: getattr(GPT2Config(), name) for name in asdict(GPT2Settings())}


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        Backbone.load(folder)


def test_an_index_that_leads_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for text, message in (('{"weight_map": {"a": "../other.safetensors"}}', "other"), ("[]", "not an index")):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            Backbone.load(folder)


def test_loading_does_not_import_transformers() -> None:
    """It takes seconds, which every start of a replica would pay."""
    code = (
        "import sys; from sae_runtime import Backbone, load_dictionary, list_builtin_dictionaries as names;"
        "Backbone.load().encode_text('text'); [load_dictionary(name) for name in names()];"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Backbone.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Backbone.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub name"):
        Backbone.load("not a name!")


def test_builtin_is_a_folder_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Backbone) -> None:
    monkeypatch.setattr(folders, "BACKBONE", GOLDEN)
    loaded = Backbone.load()
    assert loaded.name == "builtin"
    assert same(loaded, golden)
    monkeypatch.setattr(folders, "BACKBONE", tmp_path)
    with pytest.raises(FileNotFoundError, match="builtin backbone is missing"):
        Backbone.load("builtin")


def test_hub_names_fetch_no_pickles(monkeypatch: pytest.MonkeyPatch, golden: Backbone) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(GOLDEN)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = Backbone.load("openai-community/gpt2")
    assert loaded.name == asked["name"] == "openai-community/gpt2"
    assert not [pattern for pattern in asked["allow_patterns"] if "bin" in pattern or pattern.endswith((".pt", "*"))]
    assert same(loaded, golden)


def test_a_hub_name_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConnectionError, match=r"'gpt2'.*offline.*folder's path"):
        Backbone.load("gpt2")


# Tokenizer files


@pytest.fixture(scope="module")
def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some words to merge, some more words"] * 3, trainer)
    return tokenizer


def test_both_forms_of_tokenizer_files(tmp_path: Path, folder: Path, byte_bpe: Tokenizer) -> None:
    byte_bpe.save(str(folder / "tokenizer.json"))
    modern = Backbone.load(folder)
    (folder / "tokenizer.json").unlink()
    byte_bpe.model.save(str(folder))  # vocab.json and merges.txt, the form of GPT-2's release
    released = Backbone.load(folder)
    assert modern.has_tokenizer
    text = "some words, größer 🙂<|endoftext|>"
    expected = byte_bpe.encode(text, add_special_tokens=False).ids
    for backbone in (released, Backbone.load(folder)):
        encoded = backbone.encode_text(text)
        assert encoded.ids == expected
        assert b"".join(map(backbone.token_bytes, encoded.ids)) == text.encode()
    assert modern.tokenizer_fingerprint == released.tokenizer_fingerprint != ""


def test_calls_of_the_transformers_tokenizer_leave_encode_text_alone(folder: Path, byte_bpe: Tokenizer) -> None:
    byte_bpe.save(str(folder / "tokenizer.json"))
    backbone = Backbone.load(folder)
    before = backbone.encode_text("some words to merge").ids
    assert backbone.tokenizer is not None
    backbone.tokenizer("some words to merge", truncation=True, max_length=2)
    assert backbone.encode_text("some words to merge").ids == before


def test_without_tokenizer_files(golden: Backbone) -> None:
    assert golden.tokenizer is None
    assert golden.tokenizer_fingerprint == ""
    with pytest.raises(ValueError, match="give token ids"):
        golden.encode_text("text")
    with pytest.raises(ValueError, match="give token ids"):
        golden.token_bytes(0)
