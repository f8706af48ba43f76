"""What every format refuses or reads alike: numbers that overflow, configurations in other encodings, damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_runtime import Dictionary, DictionaryFormatError, load_dictionary
from sae_runtime.dictionary.formats.published import save_dictionary
from sae_runtime.dictionary.manifest import BackboneReference
from tests import golden

FORMATS = {
    "saelens": ("saelens_topk_none_sub", "cfg.json"),
    "sparsify": ("sparsify_topk", "cfg.json"),
    "dictionary_learning": ("dl_topk", "config.json"),
    "published": ("", "dictionary.json"),
}


def folder_of(format: str, folder: Path) -> Path:
    """A dictionary of a format in a folder of its own."""
    case, _ = FORMATS[format]
    if case:
        return Path(shutil.copytree(golden.FOLDER / case, folder))
    dictionary = load_dictionary(golden.FOLDER / "saelens_topk_none_sub")
    save_dictionary(dictionary, folder, backbone=BackboneReference("tiny", "f" * 64), dtype="float32")
    return folder


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_configuration_with_a_byte_order_mark_is_read(format: str, encoding: str, tmp_path: Path) -> None:
    folder = folder_of(format, tmp_path / "d")
    expected = load_dictionary(folder)
    file = folder / FORMATS[format][1]
    file.write_text(file.read_text(), encoding=encoding)
    assert torch.equal(load_dictionary(folder).encoder, expected.encoder)


@pytest.mark.parametrize("content", ["", "[]", "null", '"text"', '{"k": 1, "k": 1}', '{"d_in": NaN}', "[" * 100_000])
@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_configuration_is_named(format: str, content: str, tmp_path: Path) -> None:
    folder = folder_of(format, tmp_path / "d")
    file = folder / FORMATS[format][1]
    file.write_text(content)
    with pytest.raises(DictionaryFormatError) as refusal:
        load_dictionary(folder)
    assert str(file) in str(refusal.value)


def too_large(format: str, folder: Path) -> Path:
    """A dictionary whose encoder is finite in float32 and not in float16."""
    if format == "openai":
        state = torch.load(golden.FOLDER / "openai_relu" / "autoencoder.pt", weights_only=True)
        state["encoder.weight"][3, 2] = 1e6
        torch.save(state, folder.with_suffix(".pt"))
        return folder.with_suffix(".pt")
    if format == "published":
        dictionary = load_dictionary(folder_of("saelens", folder.with_name("source")))
        dictionary.encoder[3, 2] = 1e6
        save_dictionary(dictionary, folder, backbone=BackboneReference("tiny", "f" * 64), dtype="float32")
        return folder
    folder_of(format, folder)
    if format == "dictionary_learning":
        state = torch.load(folder / "ae.pt", weights_only=True)
        state["encoder.weight"][3, 2] = 1e6
        torch.save(state, folder / "ae.pt")
        return folder
    file = next(folder.glob("sae*.safetensors"))
    tensors = load_file(file)
    tensors["W_enc" if format == "saelens" else "encoder.weight"][2, 3] = 1e6
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("format", [*FORMATS, "openai"])
def test_weights_that_overflow_the_dtype_are_refused(format: str, tmp_path: Path) -> None:
    path = too_large(format, tmp_path / "d")
    for dtype in (torch.float32, torch.bfloat16):
        assert load_dictionary(path, dtype=dtype).encoder.max() > 9e5
    with pytest.raises(DictionaryFormatError, match=r"encoder overflows torch\.float16; load it with a wider dtype"):
        load_dictionary(path, dtype=torch.float16)


def test_a_scale_that_overflows_is_refused(tmp_path: Path) -> None:
    """SAELens stores the logarithm of a gate's scale."""
    folder = Path(shutil.copytree(golden.FOLDER / "saelens_gated_none_sub", tmp_path / "d"))
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"r_mag": torch.full_like(tensors["r_mag"], 100.0)}, folder / "sae_weights.safetensors")
    with pytest.raises(DictionaryFormatError, match=r"magnitude_scale overflows torch\.float32"):
        load_dictionary(folder)


@pytest.mark.parametrize("case", ["saelens_jumprelu_none_sub", "dl_jumprelu"])
def test_a_negative_threshold_acts_as_zero(case: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden.FOLDER / case, tmp_path / "d"))
    negative: dict[float, Dictionary] = {}
    for value in (-1.0, 0.0):
        if case.startswith("dl"):
            state = torch.load(folder / "ae.pt", weights_only=True)
            torch.save(state | {"threshold": torch.full_like(state["threshold"], value)}, folder / "ae.pt")
        else:
            tensors = load_file(folder / "sae_weights.safetensors")
            tensors["threshold"] = torch.full_like(tensors["threshold"], value)
            save_file(tensors, folder / "sae_weights.safetensors")
        negative[value] = load_dictionary(folder)
    x = load_file(folder / "expected.safetensors")["x"]
    assert torch.equal(negative[-1.0].encode_dense(x), negative[0.0].encode_dense(x))


def test_numbers_of_eight_bits_are_read(tmp_path: Path) -> None:
    folder = folder_of("sparsify", tmp_path / "d")
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(folder / "sae.safetensors").items()}
    save_file(tensors, folder / "sae.safetensors")
    assert torch.equal(load_dictionary(folder).encoder, tensors["encoder.weight"].float())


@pytest.mark.parametrize("k", ["8", True, 8.5, None, 0, -8, 97, [8]])
@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_k_is_refused(format: str, k: object, tmp_path: Path) -> None:
    folder = folder_of(format, tmp_path / "d")
    file = folder / FORMATS[format][1]
    config = json.loads(file.read_text())
    if format == "dictionary_learning":  # its file of weights says k as well, and counts
        state = torch.load(folder / "ae.pt", weights_only=True)
        torch.save({name: tensor for name, tensor in state.items() if name != "k"}, folder / "ae.pt")
        config["trainer"]["k"] = k
    else:
        config["k"] = k
    file.write_text(json.dumps(config))
    with pytest.raises(DictionaryFormatError, match=r"\bk is "):
        load_dictionary(folder)
