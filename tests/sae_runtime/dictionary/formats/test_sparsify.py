"""sparsify's folders: what they say and every way they can be wrong. Numbers are in test_golden.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae_runtime import DictionaryFormatError, Edit, InvalidEdit, load_dictionary
from sae_runtime.edits import check_edits

N, D = 6, 4


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """A hookpoint's folder of 6 latents over 4 dimensions; None removes a key or a tensor."""
    normal = torch.Generator().manual_seed(5)
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    stored = {name: torch.randn(shape, generator=normal) for name, shape in shapes.items()} | (tensors or {})
    settings = {"d_in": D, "num_latents": N, "k": 2} | config
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "sae.safetensors")
    text = json.dumps({name: value for name, value in settings.items() if value is not None})
    (folder / "cfg.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("hookpoint", "transcode", "site"),
    [
        ("h.8", False, "8.resid_post_mlp"),
        ("transformer.h.8.mlp", False, "8.resid_delta_mlp"),
        ("h.8", True, "8.resid_pre"),
        ("h.8.mlp", True, None),  # reads the output of ln_2
        ("layers.3", False, None),
    ],
)
def test_the_folder_names_the_site(hookpoint: str, transcode: bool, site: str | None, tmp_path: Path) -> None:
    dictionary = load_dictionary(write(tmp_path / hookpoint, {"transcode": transcode}))
    assert (dictionary.site, dictionary.name, dictionary.transcoder) == (site, hookpoint, transcode)
    assert dictionary.origin is not None
    assert dictionary.origin.hook == hookpoint


def test_a_file_of_the_folder_names_it_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "h.8", {})
    for name in ("cfg.json", "sae.safetensors"):
        assert load_dictionary(folder / name).site == "8.resid_post_mlp"


def test_a_transcoder_is_not_edited(tmp_path: Path) -> None:
    """Its decoder writes in another space than the activation that it reads."""
    dictionary = load_dictionary(write(tmp_path / "h.8", {"transcode": True}))
    with pytest.raises(InvalidEdit, match="decodes to another site than it reads"):
        check_edits([Edit("t", 0, "ablate_zero")], {"t": dictionary})


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "activation": ({"activation": "relu"}, {}, "activation is 'relu', expected topk or groupmax"),
    "signed": ({"signed": True}, {}, r"cfg\.json: signed is True, which is not supported; expected false or null"),
    "another encoder": ({"encoder_pkm": True}, {}, "encoder_pkm is True, which is not supported"),
    "cross-layer": ({"n_targets": 3}, {}, "n_targets is 3, which is not supported; expected false or 0 or null"),
    "unknown key": ({"gain": 2.0}, {}, r"cfg\.json: gain is 2\.0, an unknown key, which may change what"),
    "text for k": ({"k": "2"}, {}, "k is '2', expected an integer"),
    "truth for k": ({"k": True}, {}, "k is True, expected an integer"),
    "no number for k": ({"k": float("nan")}, {}, "NaN is not JSON"),
    "no width": ({"d_in": None}, {}, "d_in is absent, expected an integer, 1 or more"),
    "width": ({"d_in": 5}, {}, r"encoder\.weight has shape \[6, 4\], expected \[6, 5\]"),
    "latents": ({"num_latents": 0, "expansion_factor": 2}, {}, r"has shape \[6, 4\], expected \[8, 4\]"),
    "negative": ({"num_latents": -1}, {}, "num_latents is -1, expected an integer, 0 or more"),
    "large k": ({"k": 7}, {}, "k is 7, expected 1 to n_latents = 6"),
    "default k": ({"k": None}, {}, "k is 32, expected 1 to n_latents = 6"),
    "group": ({"activation": "groupmax", "k": 4}, {}, "k is 4, expected a divisor of n_latents = 6 for groupmax"),
    "transcode": ({"transcode": "no"}, {}, "transcode is 'no', expected true or false"),
    "no skip": ({"skip_connection": True}, {}, "missing W_skip; found"),
    "skip": ({}, {"W_skip": torch.zeros(D, D)}, r"unknown tensors \['W_skip'\], expected"),
    "skip shape": ({"skip_connection": True}, {"W_skip": torch.zeros(D, 1)}, r"W_skip has shape \[4, 1\]"),
    "missing": ({}, {"b_dec": None}, r"missing b_dec; found W_dec, encoder\.bias, encoder\.weight"),
    "NaN": ({}, {"b_dec": torch.full((D,), float("inf"))}, "b_dec holds NaN or infinite values"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_contents_are_named(case: str, tmp_path: Path) -> None:
    config, tensors, message = WRONG[case]
    with pytest.raises(DictionaryFormatError, match=message):
        load_dictionary(write(tmp_path / "h.8", config, tensors))


def test_keys_of_other_versions_that_change_nothing_are_allowed(tmp_path: Path) -> None:
    first = {"normalize_decoder": True, "signed": False, "monet": False, "encoder_pkm": False, "pkm_heads": 1}
    branch = {"optimized_encoder_config": "None_", "pkm_config": {"pkm_pad": False}, "matching_pursuit": False}
    for number, config in enumerate((first, branch, {"n_targets": 0, "coalesce_topk": "none"})):
        assert load_dictionary(write(tmp_path / str(number) / "h.8", config)).k == 2


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "h.8", {})
    weights = (folder / "sae.safetensors").read_bytes()
    for length in (0, len(weights) // 2):
        (folder / "sae.safetensors").write_bytes(weights[:length])
        with pytest.raises(DictionaryFormatError, match=r"sae\.safetensors: cannot be read as safetensors"):
            load_dictionary(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(DictionaryFormatError, match=r"cfg\.json: cannot be read as JSON, expected sparsify's folder"):
        load_dictionary(folder)
