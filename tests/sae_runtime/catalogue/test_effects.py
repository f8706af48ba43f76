"""Ablation and output score against Hugging Face's model in float64, one row and one latent at a time."""

from pathlib import Path

import pytest
import torch

from sae_runtime import Backbone
from sae_runtime.catalogue.effects import ablation_kl, output_scores
from tests.sae_runtime.evaluation.reference import HookedModel, random_dictionary, random_rows

SITE = "0.resid_post_mlp"


@pytest.mark.parametrize("family", ["topk", "relu"])
def test_ablation(tiny_backbone: Backbone, tiny_backbone_folder: Path, family: str) -> None:
    dictionary, model = random_dictionary(family), HookedModel(tiny_backbone_folder, SITE)
    rows = {latent: random_rows(9, 20, 6, seed=latent) for latent in (2, 7, 30, 45)}
    found = ablation_kl(tiny_backbone, dictionary, rows)
    for latent, of_latent in rows.items():
        kl, n = 0.0, 0
        for row in of_latent:
            clean, x = model(row)
            z = dictionary.encode_dense(x.float())[:, latent].double()
            change = -z[:, None] * x.std(1, keepdim=True) * dictionary.decoder[latent].double()
            changed, _ = model(row, lambda hidden, change=change: hidden + change)
            p, q = clean.log_softmax(-1), changed.log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(-1)[z > 0].sum())
            n += int((z > 0).sum())
        if n:
            assert found[latent] == pytest.approx(kl / n, rel=1e-3, abs=1e-7)
        else:
            assert latent not in found
    assert 45 not in found  # it never fires
    assert len(found) >= 2


@pytest.mark.parametrize("family", ["topk", "relu"])
def test_output_score(tiny_backbone: Backbone, tiny_backbone_folder: Path, family: str) -> None:
    dictionary, model = random_dictionary(family), HookedModel(tiny_backbone_folder, SITE)
    rows = random_rows(5, 12, 3)
    promoted = {latent: torch.tensor([latent, 100 + latent, 7]).numpy() for latent in (1, 8, 20)}
    maxima = {1: 2.0, 8: 0.5, 20: 10.0}
    found = output_scores(tiny_backbone, dictionary, maxima, promoted, rows)
    for latent, tokens in promoted.items():
        changes = []
        for row in rows:
            clean, x = model(row)
            z = dictionary.encode_dense(x.float())[-1, latent].double()
            change = torch.zeros_like(x)
            change[-1] = (maxima[latent] - z) * x[-1].std() * dictionary.decoder[latent].double()
            changed, _ = model(row, lambda hidden, change=change: hidden + change)
            p, q = (logits[-1].softmax(-1)[tokens].sum().log() for logits in (clean, changed))
            changes.append(float(q - p))
        assert found[latent] == pytest.approx(sum(changes) / len(changes), rel=1e-3, abs=1e-6)
    assert output_scores(tiny_backbone, dictionary, maxima, promoted, []) == {}
