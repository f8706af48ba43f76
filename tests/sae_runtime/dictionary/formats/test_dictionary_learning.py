"""dictionary_learning's folders: classes, backups, and every way they can be wrong. Numbers are in test_golden.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_runtime import DictionaryFormatError, load_dictionary
from tests import golden

GOLDEN = golden.FOLDER
CASES = sorted(path.name for path in GOLDEN.glob("dl_*"))


def changed(case: str, folder: Path, state: dict[str, Any] | None = None, config: Any = ...) -> Path:
    """A golden case with other contents: None removes a key of ae.pt, `config` replaces the trainer's settings."""
    folder.mkdir()
    stored = torch.load(GOLDEN / case / "ae.pt", weights_only=True) | (state or {})
    torch.save({name: value for name, value in stored.items() if value is not None}, folder / "ae.pt")
    if config is ...:
        shutil.copy(GOLDEN / case / "config.json", folder)
    elif config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_a_folder_says_beyond_its_weights(tmp_path: Path) -> None:
    dictionary = load_dictionary(GOLDEN / "dl_topk")
    assert (dictionary.site, dictionary.name) == ("1.resid_post_mlp", "dl_topk")
    assert dictionary.origin is not None
    assert (dictionary.origin.hook, dictionary.origin.model) == ("resid_post_layer_1", "gpt2")
    assert dictionary.origin.context_length == 128
    for trainer, buffer in (
        ({"submodule_name": "mlp somewhere"}, {}),
        ({"submodule_name": "resid_post_layer_1"}, {"io": "in"}),
    ):
        config = {"trainer": {"dict_class": "AutoEncoderTopK"} | trainer, "buffer": buffer}
        dictionary_elsewhere = load_dictionary(changed("dl_topk", tmp_path / str(len(buffer)), config=config))
        assert dictionary_elsewhere.site is None
        assert dictionary_elsewhere.origin is not None
        assert dictionary_elsewhere.origin.hook == trainer["submodule_name"]


@pytest.mark.parametrize(("io", "transcoder"), [("out", False), ("in", False), ("in_and_out", True)])
def test_inputs_decoded_to_outputs_make_a_transcoder(io: str, transcoder: bool, tmp_path: Path) -> None:
    config = {"trainer": {"dict_class": "AutoEncoderTopK"}, "buffer": {"io": io, "ctx_len": 128}}
    assert load_dictionary(changed("dl_topk", tmp_path / "d", config=config)).transcoder == transcoder


@pytest.mark.parametrize("case", CASES)
def test_the_file_alone_is_enough_where_its_keys_tell_the_class(case: str, tmp_path: Path) -> None:
    folder = changed(case, tmp_path / "d", config=None)
    if case in ("dl_topk", "dl_batchtopk", "dl_batchtopk_threshold_unset"):
        with pytest.raises(
            DictionaryFormatError, match=r"no trainer\.dict_class in config\.json, and the keys .* open"
        ):
            load_dictionary(folder / "ae.pt")
    else:
        x = load_file(GOLDEN / case / "expected.safetensors")["x"]
        expected = load_dictionary(GOLDEN / case).encode_dense(x)
        assert torch.equal(load_dictionary(folder / "ae.pt").encode_dense(x), expected)


def test_new_autoencoders_whose_trainer_wrote_the_old_class(tmp_path: Path) -> None:
    folder = changed("dl_autoencodernew", tmp_path / "d", config={"trainer": {"dict_class": "AutoEncoder"}})
    x = load_file(GOLDEN / "dl_autoencodernew" / "expected.safetensors")["x"]
    expected = load_dictionary(GOLDEN / "dl_autoencodernew").encode_dense(x)
    assert torch.equal(load_dictionary(folder).encode_dense(x), expected)


@pytest.mark.parametrize("case", CASES)
def test_backup_in_the_middle_of_a_run(case: str, tmp_path: Path) -> None:
    """The trainer saw x / 3 and its biases are in those units; x is three times what it reconstructs from x / 3."""
    stored = torch.load(GOLDEN / case / "ae.pt", weights_only=True)
    folder = tmp_path / "d"
    folder.mkdir()
    shutil.copy(GOLDEN / case / "config.json", folder)
    backup = {"step": 7, "ae": stored, "optimizer": {"state": {}, "param_groups": []}, "config": {}}
    plain = load_dictionary(GOLDEN / case)
    x = load_file(GOLDEN / case / "expected.safetensors")["x"]

    torch.save(backup, folder / "ae.pt")
    assert torch.equal(load_dictionary(folder).encode_dense(x), plain.encode_dense(x))

    torch.save(backup | {"norm_factor": 3.0}, folder / "ae.pt")
    scaled = load_dictionary(folder)
    torch.testing.assert_close(scaled.encode_dense(3 * x), 3 * plain.encode_dense(x), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        scaled.decode(scaled.encode(3 * x)), 3 * plain.decode(plain.encode(x)), rtol=1e-5, atol=1e-2
    )


def test_older_topk_files_have_their_k_in_the_configuration(tmp_path: Path) -> None:
    config = {"trainer": {"dict_class": "AutoEncoderTopK", "k": 5}}
    assert load_dictionary(changed("dl_topk", tmp_path / "d", {"k": None, "threshold": None}, config)).k == 5


WRONG: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "class": (
        "dl_topk",
        {},
        {"trainer": {"dict_class": "IdentityDict"}},
        "dict_class is 'IdentityDict', expected one of",
    ),
    "list": ("dl_topk", {}, {"trainer": {"dict_class": []}}, r"dict_class is \[\], expected one of"),
    "trainer": ("dl_topk", {}, {"trainer": 3}, "trainer is 3, expected an object with dict_class"),
    "another class": ("dl_topk", {}, {"trainer": {"dict_class": "JumpReluAutoEncoder"}}, "expected W_enc"),
    "missing": ("dl_topk", {"b_dec": None}, ..., "missing b_dec; found"),
    "no encoder": ("dl_topk", {"encoder.weight": None}, ..., r"expected encoder\.weight \[n, d\]"),
    "shape": ("dl_topk", {"b_dec": torch.zeros(5)}, ..., r"b_dec has shape \[5\], expected \[16\]"),
    "transposed": ("dl_topk", {"decoder.weight": torch.zeros(96, 16)}, ..., r"shape \[96, 16\], expected \[16, 96\]"),
    "k": ("dl_topk", {"k": torch.tensor(97)}, ..., "k is 97, expected 1 to n_latents = 96"),
    "many k": ("dl_topk", {"k": torch.ones(2)}, ..., r"k is a tensor \[2\], expected one number"),
    "threshold": ("dl_batchtopk", {"threshold": None}, ..., "threshold is None, expected one number"),
    "NaN": ("dl_gated", {"r_mag": torch.full((96,), float("nan"))}, ..., "r_mag holds NaN or infinite values"),
    "integers": ("dl_gated", {"r_mag": torch.ones(96).int()}, ..., r"r_mag is torch\.int32, expected a floating"),
    "infinite threshold": ("dl_batchtopk", {"threshold": float("inf")}, ..., "threshold is inf, expected one number"),
    "half of k": ("dl_topk", {"k": torch.tensor(8.5)}, ..., r"k is 8\.5, expected an integer"),
    "no number for k": ("dl_topk", {"k": float("nan")}, ..., "k is nan, expected one number"),
    "unknown tensor": ("dl_topk", {"gain": torch.ones(96)}, ..., r"ae\.pt: gain is tensor\(.*, an unknown key"),
    "unknown setting": (
        "dl_topk",
        {},
        {"trainer": {"dict_class": "AutoEncoderTopK", "signed": True}},
        r"config\.json: trainer\.signed is True, an unknown key",
    ),
    "factor in the settings": (
        "dl_topk",
        {},
        {"trainer": {"dict_class": "AutoEncoderTopK", "norm_factor": 3.0}},
        r"trainer\.norm_factor is 3\.0, an unknown key",
    ),
    "unknown section": (
        "dl_topk",
        {},
        {"trainer": {"dict_class": "AutoEncoderTopK"}, "normalizer": {}},
        r"config\.json: normalizer is \{\}, an unknown key",
    ),
    "unknown in buffer": (
        "dl_topk",
        {},
        {"trainer": {"dict_class": "AutoEncoderTopK"}, "buffer": {"rescale_acts": 2}},
        r"buffer\.rescale_acts is 2, an unknown key",
    ),
    "buffer": ("dl_topk", {}, {"trainer": {"dict_class": "AutoEncoderTopK"}, "buffer": 3}, "buffer is 3, expected an"),
    "io": (
        "dl_topk",
        {},
        {"trainer": {"dict_class": "AutoEncoderTopK"}, "buffer": {"io": "both"}},
        r"buffer\.io is 'both', expected out, in or in_and_out",
    ),
    "factor": ("dl_topk", {"ae": {}, "norm_factor": -1.0}, ..., r"norm_factor is -1\.0, expected a positive number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_contents_are_named(case: str, tmp_path: Path) -> None:
    source, state, config, message = WRONG[case]
    with pytest.raises(DictionaryFormatError, match=message):
        load_dictionary(changed(source, tmp_path / "d", state, config))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = changed("dl_topk", tmp_path / "d")
    whole = (folder / "ae.pt").read_bytes()
    for length in (0, len(whole) // 2):
        (folder / "ae.pt").write_bytes(whole[:length])
        with pytest.raises(
            DictionaryFormatError, match=r"ae\.pt: found \d+ bytes that do not read as dictionary_learn"
        ):
            load_dictionary(folder)
    (folder / "config.json").write_text("{")
    (folder / "ae.pt").write_bytes(whole)
    with pytest.raises(DictionaryFormatError, match=r"config\.json: cannot be read as JSON, expected dictionary_learn"):
        load_dictionary(folder)


class Malicious:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    folder = changed("dl_topk", tmp_path / "d", {"extra": Malicious(target)})
    with pytest.raises(DictionaryFormatError, match="was not loaded"):
        load_dictionary(folder)
    assert not target.exists()
    torch.load(folder / "ae.pt", weights_only=False)  # the test would notice
    assert target.exists()
