"""Promoted and suppressed tokens against Hugging Face's weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae_runtime import Backbone, Site
from sae_runtime.catalogue import logit_tokens as module
from sae_runtime.catalogue.logit_tokens import logit_tokens


@pytest.mark.parametrize("site", ["0.resid_post_mlp", "1.resid_delta_attn", "1.mlp_post_act"])
@pytest.mark.parametrize("tile", [1, 1 << 23])
def test_the_ends_of_all_logits(
    tiny_backbone: Backbone, tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch, site: str, tile: int
) -> None:
    from transformers import GPT2LMHeadModel

    monkeypatch.setattr(module, "_TILE_ELEMENTS", tile)
    model = GPT2LMHeadModel.from_pretrained(tiny_backbone_folder).eval()
    decoder = torch.randn(7, tiny_backbone.site_width(site), generator=torch.Generator().manual_seed(2))
    stream = decoder @ model.transformer.h[1].mlp.c_proj.weight if "mlp_post_act" in site else decoder
    centred = stream - stream.mean(1, keepdim=True)
    logits = (centred * model.transformer.ln_f.weight) @ model.lm_head.weight.T
    logits = (logits - logits.mean(1, keepdim=True)).detach().numpy()
    found = logit_tokens(tiny_backbone, Site.parse(site), decoder, 5)
    order = np.argsort(logits, axis=1)
    assert found.promoted.tolist() == order[:, ::-1][:, :5].tolist()
    assert found.suppressed.tolist() == order[:, :5].tolist()
    assert found.promoted_change == pytest.approx(np.take_along_axis(logits, found.promoted, 1), abs=1e-4)
    assert found.suppressed_change == pytest.approx(np.take_along_axis(logits, found.suppressed, 1), abs=1e-4)


def test_it_is_the_derivative_of_the_logits(tiny_backbone: Backbone) -> None:
    """At the last site, for rows that keep the size of the layer norm's input: size x d logits / d amount."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 16, generator=generator)
    x -= x.mean()
    row = torch.randn(1, 16, generator=generator)
    row -= row.mean() + (row @ x.T) / (x @ x.T) * x  # orthogonal to x, so that the size does not change
    step = 1e-2
    change = (tiny_backbone.unembed(x + step * row) - tiny_backbone.unembed(x - step * row)) / (2 * step)
    direct = tiny_backbone.direct_logits("1.resid_post_mlp", row)
    assert (change * x.std(correction=0)).numpy() == pytest.approx(direct.numpy(), rel=2e-2, abs=2e-3)
