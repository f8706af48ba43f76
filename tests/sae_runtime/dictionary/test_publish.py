"""Files of other projects in the published form: same numbers, checked against the backbone."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_runtime import Backbone, DictionaryFormatError, FingerprintMismatch, load_dictionary
from sae_runtime.dictionary.publish import publish
from tests import golden

GOLDEN = golden.FOLDER


@pytest.mark.filterwarnings("ignore:.*BOS")
def test_a_foreign_file_becomes_a_published_dictionary(tiny_backbone: Backbone, tmp_path: Path) -> None:
    case = GOLDEN / "saelens_gated_layernorm_nosub"
    dictionary = load_dictionary(case)
    manifest = publish(dictionary, tmp_path / "d", tiny_backbone)
    loaded = load_dictionary(tmp_path / "d", backbone=tiny_backbone)
    assert (loaded.name, loaded.site) == ("saelens_gated_layernorm_nosub", "1.resid_post_mlp")
    assert manifest.backbone.fingerprint == tiny_backbone.fingerprint
    assert manifest.context_length == 64
    config = manifest.provenance.config
    assert (config["converted_from"], config["hook"], config["model"]) == (
        "saelens",
        "blocks.1.hook_resid_post",
        "gpt2",
    )
    assert config["architecture"] == "gated"
    x = load_file(case / "expected.safetensors")["x"]
    assert torch.equal(loaded.encode_dense(x), dictionary.encode_dense(x))
    # Published once more, nothing of its history is lost.
    again = publish(loaded, tmp_path / "again", tiny_backbone, name="other", dtype="bfloat16")
    assert (again.name, again.dtype) == ("other", "bfloat16")
    assert again.provenance == manifest.provenance


def test_training_with_bos_is_recorded_and_warned_of(tiny_backbone: Backbone, tmp_path: Path) -> None:
    dictionary = load_dictionary(GOLDEN / "saelens_gated_layernorm_nosub")
    with pytest.warns(UserWarning, match="trained on texts that begin with a BOS token"):
        manifest = publish(dictionary, tmp_path / "d", tiny_backbone)
    assert manifest.provenance.config["prepend_bos"] is True
    with pytest.warns(UserWarning, match="trained on texts that begin with a BOS token"):
        assert load_dictionary(tmp_path / "d", backbone=tiny_backbone).prepend_bos is True
    unknown = replace(load_dictionary(GOLDEN / "sparsify_topk"), site="0.resid_pre")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "prepend_bos" not in publish(unknown, tmp_path / "e", tiny_backbone).provenance.config


def test_what_does_not_fit_is_refused(tiny_backbone: Backbone, tmp_path: Path) -> None:
    dictionary = load_dictionary(GOLDEN / "sparsify_topk")
    with pytest.raises(ValueError, match=r"which site it reads \(the file calls it 'sparsify_topk'\); give one"):
        publish(dictionary, tmp_path / "d", tiny_backbone)
    with pytest.raises(DictionaryFormatError, match="layers 0 to 1"):
        publish(replace(dictionary, site="7.resid_pre"), tmp_path / "d", tiny_backbone)
    with pytest.raises(DictionaryFormatError, match="reads 16 values per token"):
        publish(replace(dictionary, site="0.mlp_post_act"), tmp_path / "d", tiny_backbone)
    publish(replace(dictionary, site="0.resid_pre"), tmp_path / "d", tiny_backbone)
    other = Backbone.random(n_layers=2, d_model=16, n_heads=2, context_length=32, vocab_size=60, seed=3)
    with pytest.raises(FingerprintMismatch):
        publish(load_dictionary(tmp_path / "d"), tmp_path / "e", other)
    assert not (tmp_path / "e").exists()
