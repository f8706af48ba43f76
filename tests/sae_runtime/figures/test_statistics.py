"""Statistics of latents on text."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_runtime import Backbone, load_dictionary
from sae_runtime.figures.statistics import measure_on_text
from tests import golden


def test_statistics_are_those_of_the_text(tiny_backbone: Backbone, tmp_path: Path) -> None:
    """Against the dense latents of all tokens at once; the text is one row of the backbone's context length."""
    text = "the quick brown fox jumps over it"[:32]
    (tmp_path / "text.txt").write_text(text)
    dictionary = load_dictionary(golden.FOLDER / "saelens_jumprelu_none_nosub")
    statistics = measure_on_text(tiny_backbone, dictionary, [tmp_path / "text.txt"], 32)
    assert tiny_backbone.tokenizer is not None
    ids = torch.tensor([tiny_backbone.tokenizer.encode(text)])
    x = tiny_backbone.activations(ids, sites=["1.resid_post_mlp"])["1.resid_post_mlp"][0]
    z = dictionary.encode_dense(x)
    assert statistics.n_tokens == 32
    torch.testing.assert_close(statistics.firing_rate, (z > 0).float().mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.mean, z.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.max, z.amax(dim=0), rtol=1e-4, atol=1e-5)


def test_a_dictionary_without_a_site_is_refused(tiny_backbone: Backbone) -> None:
    dictionary = replace(load_dictionary(golden.FOLDER / "saelens_jumprelu_none_nosub"), site=None)
    with pytest.raises(ValueError, match="does not say which site it reads"):
        measure_on_text(tiny_backbone, dictionary, [], 32)
