"""SAELens' folders: what they say, writing them, and every way they can be wrong. Numbers are in test_golden.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_runtime import Dictionary, DictionaryFormatError, LatentStatistics, load_dictionary
from sae_runtime.dictionary.formats.saelens import save_saelens
from tests import golden

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # see test_saelens_config.py
GOLDEN = golden.FOLDER
CASES = sorted(path.name for path in GOLDEN.glob("saelens_*"))
N, D = 6, 4


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A folder of 6 latents over 4 dimensions; None removes a key or a tensor."""
    normal = torch.Generator().manual_seed(5)
    whole = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,), "threshold": (N,)}
    stored = {name: torch.randn(shape, generator=normal) for name, shape in whole.items()} | tensors
    settings = {"architecture": "jumprelu", "d_in": D, "d_sae": N, "metadata": {"sae_lens_version": "6.54.12"}} | config
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "sae_weights.safetensors"
    )
    text = json.dumps({name: value for name, value in settings.items() if value is not None})
    (folder / "cfg.json").write_text(text)
    return folder


def test_what_a_file_says_beyond_its_weights() -> None:
    dictionary = load_dictionary(GOLDEN / "saelens_jumprelu_none_sub")
    assert dictionary.site == "1.resid_post_mlp"
    assert dictionary.name == "saelens_jumprelu_none_sub"
    assert dictionary.origin is not None
    assert (dictionary.origin.hook, dictionary.origin.model) == ("blocks.1.hook_resid_post", "gpt2")
    assert dictionary.origin.context_length == 64
    legacy = load_dictionary(GOLDEN / "saelens_legacy_standard")
    assert legacy.site == "1.resid_pre"
    assert legacy.origin is not None
    assert legacy.origin.model == "gpt2-small"


def test_an_unknown_place_keeps_its_name(tmp_path: Path) -> None:
    dictionary = load_dictionary(write(tmp_path / "d", {"metadata": {"hook_name": "blocks.3.attn.hook_z"}}, {}))
    assert dictionary.site is None
    assert dictionary.origin is not None
    assert dictionary.origin.hook == "blocks.3.attn.hook_z"


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_file_of_the_folder_names_it_too(name: str) -> None:
    folder = GOLDEN / "saelens_topk_none_sub"
    assert torch.equal(load_dictionary(folder / name).encoder, load_dictionary(folder).encoder)


def test_latent_without_direction_is_silent_under_rescaling(tmp_path: Path) -> None:
    decoder = torch.ones(N, D)
    decoder[2] = 0
    config = {"architecture": "topk", "k": N, "rescale_acts_by_decoder_norm": True}
    tensors = {"threshold": None, "W_dec": decoder, "b_enc": torch.full((N,), 100.0)}
    dictionary = load_dictionary(write(tmp_path / "d", config, tensors))
    z = dictionary.encode_dense(torch.zeros(1, D))
    assert (z[0] > 0).tolist() == [True, True, False, True, True, True]
    assert dictionary.decode(dictionary.encode(torch.zeros(1, D))).isfinite().all()


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "architecture": ({"architecture": "temporal"}, {}, "architecture is 'temporal', expected one of standard, topk"),
    "list": ({"architecture": ["topk"]}, {}, r"architecture is \['topk'\], expected one of"),
    "training": ({"architecture": "batchtopk"}, {}, "a training checkpoint; expected the inference form"),
    "activation": (
        {"architecture": "standard", "activation_fn_str": "tanh-relu"},
        {"threshold": None},
        "activation function is 'tanh-relu', expected relu or topk",
    ),
    "no k": ({"architecture": "topk"}, {"threshold": None}, "k is absent, expected an integer, 1 or more"),
    "part of k": ({"architecture": "topk", "k": 2.5}, {"threshold": None}, "k is 2.5, expected an integer"),
    "large k": ({"architecture": "topk", "k": 7}, {"threshold": None}, "k is 7, expected 1 to n_latents = 6"),
    "normalize": ({"normalize_activations": "covariance_whitening"}, {}, "is 'covariance_whitening', expected one of"),
    "bias": ({"apply_b_dec_to_input": "yes"}, {}, "apply_b_dec_to_input is 'yes', expected true or false"),
    "no width": ({"d_in": None}, {}, "d_in is absent, expected an integer, 1 or more"),
    "width": ({"d_in": 5}, {}, r"W_enc has shape \[4, 6\], expected \[5, 6\]"),
    "metadata": ({"metadata": 3}, {}, "metadata is 3, expected an object"),
    "missing": ({}, {"b_dec": None}, "missing b_dec; found W_dec, W_enc, b_enc, threshold"),
    "missing threshold": ({}, {"threshold": None}, "missing threshold"),
    "gated keys": ({"architecture": "gated"}, {}, "missing b_gate, r_mag, b_mag; found"),
    "unknown tensor": ({"architecture": "standard"}, {}, r"unknown tensors \['threshold'\], expected .* standard"),
    "finetuned": ({}, {"scaling_factor": 2 * ones(N)}, "scaling_factor is not all 1"),
    "transposed": ({}, {"W_dec": ones(D, N)}, r"W_dec has shape \[4, 6\], expected \[6, 4\]"),
    "integers": ({}, {"b_dec": ones(D).int()}, "b_dec is torch.int32, expected a floating"),
    "NaN": ({}, {"b_dec": ones(D) * float("nan")}, "b_dec holds NaN or infinite values"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_contents_are_named(case: str, tmp_path: Path) -> None:
    config, tensors, message = WRONG[case]
    with pytest.raises(DictionaryFormatError, match=message):
        load_dictionary(write(tmp_path / "d", config, tensors))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", {}, {})
    weights = (folder / "sae_weights.safetensors").read_bytes()
    for length in (0, 5, len(weights) // 2, len(weights) - 1):
        (folder / "sae_weights.safetensors").write_bytes(weights[:length])
        with pytest.raises(DictionaryFormatError, match=r"sae_weights\.safetensors: cannot be read as safetensors"):
            load_dictionary(folder)
    (folder / "cfg.json").write_text('{"d_in": ')
    with pytest.raises(DictionaryFormatError, match=r"cfg\.json: cannot be read as JSON, expected SAELens' folder"):
        load_dictionary(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(DictionaryFormatError, match=r"expected SAELens' folder .*: found a list, expected an object"):
        load_dictionary(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(DictionaryFormatError, match=r"cfg\.json: cannot be read"):
        load_dictionary(folder)


def assert_same(copy: Dictionary, dictionary: Dictionary, x: Tensor) -> None:
    encoded, expected = copy.encode(x), dictionary.encode(x)
    torch.testing.assert_close(encoded.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(copy.decode(encoded), dictionary.decode(expected), rtol=1e-5, atol=1e-3)


# Everything that another file format holds, too: what SAELens cannot express is tested below.
SAYABLE = [
    path.name
    for path in sorted(GOLDEN.iterdir())
    if path.is_dir()
    and path.name.partition("_")[0] in ("openai", "saelens", "dl", "sparsify")
    and not any(kind in path.name for kind in ("skip", "transcode", "groupmax", "identity"))
]


@pytest.mark.parametrize("case", SAYABLE)
def test_written_folder_reads_back_the_same(case: str, tmp_path: Path) -> None:
    source = GOLDEN / case
    dictionary = load_dictionary(source / "autoencoder.pt" if case.startswith("openai") else source)
    save_saelens(dictionary, tmp_path / "copy")
    copy = load_dictionary(tmp_path / "copy")
    assert (copy.activation, copy.k, copy.normalization) == (
        dictionary.activation,
        dictionary.k,
        dictionary.normalization,
    )
    assert_same(copy, dictionary, load_file(source / "expected.safetensors")["x"])
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    config = json.loads((tmp_path / "copy" / "cfg.json").read_text())
    if dictionary.site is not None:
        assert load_dictionary(tmp_path / "copy").site == dictionary.site
        assert config["metadata"]["hook_name"].startswith("blocks.1.")


@pytest.mark.parametrize("case", ["saelens_gated_none_sub", "saelens_jumprelu_none_sub", "saelens_standard_none_sub"])
def test_a_bias_that_is_subtracted_but_not_added_is_folded(case: str, tmp_path: Path) -> None:
    dictionary = load_dictionary(GOLDEN / case)
    dictionary = replace(dictionary, output_bias=torch.linspace(-1, 1, 16))
    save_saelens(dictionary, tmp_path / "copy")
    copy = load_dictionary(tmp_path / "copy")
    assert not copy.pre_bias.any()
    assert_same(copy, dictionary, load_file(GOLDEN / case / "expected.safetensors")["x"])


def test_firing_rates_are_written_as_sparsity(tmp_path: Path) -> None:
    dictionary = load_dictionary(GOLDEN / "saelens_topk_none_sub")
    rates = torch.linspace(0, 1, 96)
    zeros = torch.zeros(96)
    statistics = LatentStatistics(rates, zeros, zeros, zeros, torch.zeros(96, 1), torch.tensor([0.5]), 10)
    save_saelens(replace(dictionary, statistics=statistics), tmp_path / "copy")
    stored = load_file(tmp_path / "copy" / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(10**stored, rates, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("sparsify_groupmax", "cannot express groupmax"),
        ("openai_topk_ln_identity/autoencoder.pt", "cannot express a top-k without ReLU"),
        ("sparsify_sae_skip", "cannot express a skip connection"),
        ("sparsify_transcode_skip", "cannot express a skip connection and a transcoder"),
    ],
)
def test_what_the_format_cannot_say_is_refused(case: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_saelens(load_dictionary(GOLDEN / case), tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def centred(**fields: Any) -> Dictionary:
    return replace(load_dictionary(GOLDEN / "saelens_topk_none_sub"), normalization="centred", **fields)


@pytest.mark.parametrize("site", ["1.resid_post_mlp", "0.resid_pre", "1.resid_delta_attn"])
def test_centred_activations_are_written_as_centred_writing_weights(site: str, tmp_path: Path) -> None:
    dictionary = centred(site=site, origin=None)
    save_saelens(dictionary, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "cfg.json").read_text())
    assert config["normalize_activations"] == "none"
    assert config["metadata"]["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    copy = load_dictionary(tmp_path / "copy")
    assert (copy.site, copy.normalization) == (site, "centred")
    assert_same(copy, dictionary, torch.randn(20, 16, generator=torch.Generator().manual_seed(1)) + 2)


@pytest.mark.parametrize("site", [None, "1.mlp_post_act"])
def test_centred_activations_outside_the_residual_stream_are_not_written(site: str | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot express the normalisation 'centred' outside the residual stream"):
        save_saelens(centred(site=site), tmp_path / "copy")


@pytest.mark.parametrize("prepend_bos", [True, False, None])
def test_whether_rows_began_with_bos_is_kept(prepend_bos: bool | None, tmp_path: Path) -> None:
    source = write(
        tmp_path / "d", {"metadata": {"hook_name": "blocks.0.hook_resid_pre"}, "prepend_bos": prepend_bos}, {}
    )
    dictionary = load_dictionary(source)
    assert dictionary.prepend_bos is prepend_bos
    save_saelens(dictionary, tmp_path / "copy")
    assert load_dictionary(tmp_path / "copy").prepend_bos is prepend_bos


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    dictionary = load_dictionary(GOLDEN / "saelens_topk_none_sub")
    (tmp_path / "copy").mkdir()
    with pytest.raises(FileExistsError):
        save_saelens(dictionary, tmp_path / "copy")
