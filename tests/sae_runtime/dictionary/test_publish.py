"""Files of other projects in the published form: same numbers, checked against the backbone, measured on text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_runtime import Backbone, DictionaryFormatError, FingerprintMismatch, load_dictionary
from sae_runtime.data.text_sample import read_sample
from sae_runtime.dictionary.publish import measure_fit, measure_on_text, publish
from tests import golden

GOLDEN = golden.FOLDER


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


def test_statistics_are_those_of_the_text(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """Against the dense latents of all tokens at once; the text is one row of the backbone's context length."""
    text = "the quick brown fox jumps over it"[:32]
    (tmp_path / "text.txt").write_text(text)
    dictionary = load_dictionary(GOLDEN / "saelens_jumprelu_none_nosub")
    done: list[int] = []
    statistics = measure_on_text(dictionary, tiny_backbone, [tmp_path / "text.txt"], 32, progress=done.append)
    assert tiny_backbone.tokenizer is not None
    ids = torch.tensor([tiny_backbone.tokenizer.encode(text)])
    x = tiny_backbone.activations(ids, sites=["1.resid_post_mlp"])["1.resid_post_mlp"][0]
    z = dictionary.encode_dense(x)
    assert (statistics.n_tokens, done) == (32, [32])
    torch.testing.assert_close(statistics.firing_rate, (z > 0).float().mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.mean, z.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.max, z.amax(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["saelens_jumprelu_none_nosub", "saelens_topk_layernorm_nosub"])
def test_the_fit_is_that_of_all_tokens_at_once(tiny_backbone: Backbone, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over it and " * 8)
    dictionary = load_dictionary(GOLDEN / name)
    fit = measure_fit(dictionary, tiny_backbone, [tmp_path / "text.txt"], 96, context_length=64)
    rows = read_sample(tiny_backbone, [tmp_path / "text.txt"], 96).rows
    site = str(dictionary.site)
    x = torch.cat([tiny_backbone.activations(torch.tensor([row]), sites=[site])[site][0] for row in rows]).double()
    features = dictionary.encode(x.float())
    error = (dictionary.decode(features).double() - x).square().sum()
    assert fit.n_tokens == len(x) == 96
    assert fit.nmse == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-5)
    assert fit.l0 == pytest.approx(float((features.indices >= 0).sum(1).double().mean()))
