"""OpenAI's .pt files: writing, and every way a file can be wrong. The golden vectors are in test_golden.py."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_runtime import DictionaryFormatError, load_dictionary
from sae_runtime.dictionary.formats.openai import load_openai, save_openai
from tests import golden

GOLDEN = golden.FOLDER
CASES = sorted(path.name for path in GOLDEN.glob("openai_*"))


@pytest.mark.parametrize("case", CASES)
def test_the_input_is_normalised_exactly_with_topk(case: str) -> None:
    options = json.loads((GOLDEN / case / "case.json").read_text())["options"]
    dictionary = load_dictionary(GOLDEN / case / "autoencoder.pt")
    assert (dictionary.normalizes_input, dictionary.k) == (options["normalize"], options["k"])


@pytest.mark.parametrize("case", CASES)
def test_written_file_reads_back_the_same(case: str, tmp_path: Path) -> None:
    dictionary = load_openai(GOLDEN / case / "autoencoder.pt")
    save_openai(dictionary, tmp_path / "copy.pt")
    copy = load_openai(tmp_path / "copy.pt")
    for name in ("encoder", "decoder", "pre_bias", "latent_bias"):
        assert torch.equal(getattr(copy, name), getattr(dictionary, name))
    for name in ("activation", "k", "normalization", "postact"):
        assert getattr(copy, name) == getattr(dictionary, name)
    assert os.listdir(tmp_path) == ["copy.pt"]  # nothing temporary is left
    # Their loader wants every key of a trained file, statistics or not.
    keys = set(torch.load(GOLDEN / "openai_relu" / "autoencoder.pt", weights_only=True))
    assert set(torch.load(tmp_path / "copy.pt", weights_only=True)) == keys


def test_site_comes_from_the_published_path_or_the_caller(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders"
    folder.mkdir(parents=True)
    (folder / "8.pt").write_bytes((GOLDEN / "openai_topk_ln" / "autoencoder.pt").read_bytes())
    assert load_dictionary(folder / "8.pt").site == "8.resid_post_mlp"
    assert load_dictionary(GOLDEN / "openai_topk_ln" / "autoencoder.pt").site is None
    assert load_openai(GOLDEN / "openai_topk_ln" / "autoencoder.pt", site="3.resid_pre").site == "3.resid_pre"


def state(**changes: Any) -> dict[str, Any]:
    """A well-formed file of 6 latents over 4 dimensions, with changes; None removes a key."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    well_formed = {
        "pre_bias": normal(4),
        "latent_bias": normal(6),
        "encoder.weight": normal(6, 4),
        "decoder.weight": normal(4, 6),
        "stats_last_nonzero": torch.zeros(6, dtype=torch.int64),
        "activation": "TopK",
        "activation_state_dict": OrderedDict(k=2, postact_fn="ReLU"),
    }
    return {name: value for name, value in (well_formed | changes).items() if value is not None}


def test_unknown_activation_name_means_relu_without_normalisation(tmp_path: Path) -> None:
    torch.save(state(activation="SoftShrink", activation_state_dict={}), tmp_path / "file.pt")
    dictionary = load_dictionary(tmp_path / "file.pt")
    assert (dictionary.activation, dictionary.k, dictionary.normalization) == ("relu", None, "none")


def test_older_container_and_half_precision_load(tmp_path: Path) -> None:
    half = {name: v.half() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in state().items()}
    torch.save(half, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert load_dictionary(tmp_path / "file.pt", dtype=torch.bfloat16).dtype == torch.bfloat16


WRONG: dict[str, tuple[Any, str]] = {
    "missing key": (state(pre_bias=None), "missing pre_bias; found latent_bias"),
    "no encoder": ({"a": torch.zeros(1)}, r"found the keys a, expected encoder\.weight"),
    "not a dict": (torch.zeros(3), "found a Tensor, expected OpenAI"),
    "decoder shape": (
        state(**{"decoder.weight": torch.zeros(6, 4)}),
        r"decoder\.weight has shape \[6, 4\], expected \[4, 6\]",
    ),
    "encoder rank": (state(**{"encoder.weight": torch.zeros(6)}), r"found \[6\], expected encoder\.weight \[n_latents"),
    "bias length": (state(latent_bias=torch.zeros(5)), r"latent_bias has shape \[5\], expected \[6\]"),
    "integers": (state(pre_bias=torch.zeros(4, dtype=torch.int32)), "pre_bias is torch.int32, expected a floating"),
    "not a tensor": (state(pre_bias=[0.0] * 4), "pre_bias is list, expected a floating"),
    "NaN": (state(pre_bias=torch.tensor([0, float("nan"), 0, 0])), "pre_bias holds NaN or infinite values"),
    "no k": (state(activation_state_dict={}), "expected an integer k"),
    "k too large": (state(activation_state_dict={"k": 7}), "k is 7, expected 1 to n_latents = 6"),
    "postact": (state(activation_state_dict={"k": 2, "postact_fn": "GELU"}), "postact_fn is 'GELU', expected ReLU"),
    "not a name": (state(activation=["TopK"]), r"activation is \['TopK'\] and activation_state_dict"),
    "options": (state(activation_state_dict=[("k", 2)]), "expected a name and a mapping"),
    "an unknown option": (
        state(activation_state_dict={"k": 2, "signed": True}),
        r"activation_state_dict\.signed is True, an unknown key",
    ),
    "options of ReLU": (state(activation="ReLU"), r"activation_state_dict\.k is 2, an unknown key"),
    "an unknown tensor": (state(gain=torch.ones(6)), r"gain is tensor\(.*, an unknown key"),
    "truth for k": (state(activation_state_dict={"k": True}), "expected an integer k"),
    "nothing": (
        state(**{"encoder.weight": torch.zeros(0, 4), "decoder.weight": torch.zeros(4, 0)}, latent_bias=torch.zeros(0)),
        r"encoder has shape \[0, 4\], expected \[n_latents, d_in\] of 1 or more",
    ),
    "sparse": (state(pre_bias=torch.zeros(4).to_sparse()), "pre_bias is torch.sparse_coo, expected a floating"),
    "dense": (state(activation="Identity"), "activation is Identity"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_contents_are_named(case: str, tmp_path: Path) -> None:
    contents, message = WRONG[case]
    torch.save(contents, tmp_path / "file.pt")
    with pytest.raises(DictionaryFormatError, match=message):
        load_dictionary(tmp_path / "file.pt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_says_what_was_found(share: float, tmp_path: Path) -> None:
    whole = (GOLDEN / "openai_topk_ln" / "autoencoder.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DictionaryFormatError, match=r"file\.pt: (found \d+ bytes that do not read|not plain tensors)"):
        load_dictionary(tmp_path / "file.pt")


@pytest.mark.parametrize("contents", [b"", b"GIF89a" + bytes(100), b'{"json": true}'])
def test_other_files_are_refused(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(contents)
    with pytest.raises(DictionaryFormatError, match=r"(expected|read as) OpenAI"):
        load_dictionary(tmp_path / "file.pt")


class Malicious:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    torch.save(state(extra=Malicious(target)), tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DictionaryFormatError, match="was not loaded"):
        load_dictionary(tmp_path / "file.pt")
    assert not target.exists()
    # The same file does run code when unpickled carelessly: the test would notice.
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert target.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "none"}, "cannot express topk with normalization none; it has"),
        ({"normalization": "centred"}, "cannot express topk with normalization centred"),
        (
            {"activation": "relu", "k": None, "normalization": "centred"},
            "cannot express relu with normalization centred",
        ),
        ({"normalization": "constant_norm"}, "cannot express topk with normalization constant_norm"),
        ({"activation": "relu", "k": None}, "cannot express relu with normalization layer_norm"),
        ({"activation": "groupmax", "postact": "relu"}, "cannot express the activation groupmax"),
        (
            {"activation": "jumprelu", "k": None, "threshold": torch.zeros(96), "normalization": "none"},
            "cannot express the activation jumprelu",
        ),
        ({"skip": torch.zeros(16, 16), "transcoder": True}, "cannot express a skip connection and a transcoder"),
    ],
)
def test_what_the_format_cannot_say_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    dictionary = replace(load_openai(GOLDEN / "openai_topk_ln" / "autoencoder.pt"), **change)
    with pytest.raises(ValueError, match=message):
        save_openai(dictionary, tmp_path / "file.pt")
    assert not list(tmp_path.iterdir())


def test_two_biases_become_one(tmp_path: Path) -> None:
    """A bias that is added but not subtracted, as in SAELens' nosub files, is folded into latent_bias."""
    dictionary = load_dictionary(GOLDEN / "saelens_standard_none_nosub")
    assert dictionary.output_bias is not None
    save_openai(dictionary, tmp_path / "file.pt")
    copy = load_dictionary(tmp_path / "file.pt")
    assert copy.output_bias is None
    x = load_file(GOLDEN / "saelens_standard_none_nosub" / "expected.safetensors")["x"]
    torch.testing.assert_close(copy.encode_dense(x), dictionary.encode_dense(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        copy.decode(copy.encode(x)), dictionary.decode(dictionary.encode(x)), rtol=1e-5, atol=1e-3
    )
