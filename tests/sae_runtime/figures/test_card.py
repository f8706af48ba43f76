"""The one card renderer, with a training run's few figures; with all of them it is tested in test_evaluate.py."""

import pytest
import torch

from sae_runtime.dictionary.manifest import Provenance
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.figures.card import density_figures_of, describe_dictionary, render_card
from tests.sae_runtime.evaluation.reference import random_dictionary


@pytest.mark.parametrize(
    ("family", "normalization", "title"),
    [
        (
            "topk",
            "layer_norm",
            "TopK (k = 6) dictionary of 48 latents for site `0.resid_post_mlp` (16 wide) of backbone",
        ),
        ("relu", "centred", "ReLU dictionary of 48 latents"),
        ("jumprelu", "none", "JumpReLU dictionary of 48 latents"),
        ("gated", "constant_norm", "Gated dictionary of 48 latents"),
    ],
)
def test_the_card_of_a_training_run(family: str, normalization: str, title: str) -> None:
    dictionary = random_dictionary(family, normalization=normalization)
    rate = torch.cat([torch.zeros(8), torch.full((20,), 0.02), torch.full((19,), 0.002), torch.ones(1)])
    statistics = LatentStatistics(
        firing_rate=rate,
        mean=rate,
        mean_square=rate,
        max=rate,
        quantiles=rate[:, None],
        quantile_levels=torch.tensor([0.5]),
        n_tokens=1000,
    )
    figures = {
        "nmse": 0.12345,
        "relative_error": 0.1,
        "nmse_normalized": 0.2,
        "l0": 6.0,
        "dead_fraction": 8 / 48,
        "dense_fraction": 1 / 48,
        "ce_clean": 4.0,
        "ce_spliced": 4.25,
        "ce_ablated": 9.0,
        "loss_recovered": 0.95,
        "n_tokens": 2048,
    }
    provenance = Provenance("saeserve 1", {"k": 6, "data": ["a", "b"]}, 3, 4096, "a.txt (12 bytes)", "2026-01-01")
    figures |= describe_dictionary(dictionary, "builtin") | density_figures_of(statistics)
    card = render_card(figures, provenance=provenance)
    assert card.startswith(f"# random-{family}\n\n{title}")
    assert ("layer-normalised" in card.split("\n\n")[1]) == (normalization == "layer_norm")
    assert ("without their mean" in card.split("\n\n")[1]) == (normalization == "centred")
    assert "| NMSE | 0.1235 |" in card or "| NMSE | 0.1234 |" in card
    assert "| Dead latents | 16.67% |" in card
    assert "Over 2,048 tokens" in card
    lines = card[card.index("```") :].splitlines()
    assert lines[1].split() == ["never", "8", "#" * 16]
    assert any(line.split()[-2:] == ["20", "#" * 40] for line in lines)  # the most common density
    assert "Share of 1,000 held-out tokens" in card
    assert "4,096 tokens of a.txt (12 bytes), seed 3." in card
    assert "| data | a, b |" in card
    for absent in ("Baselines", "Probes", "N2G", "By kind", "intervals", "!["):
        assert absent not in card


def test_ngrams_cannot_break_a_table() -> None:
    figures = {
        "dictionary": "d",
        "site": "0.resid_pre",
        "backbone": "b",
        "activation": "relu",
        "normalization": "none",
        "d_in": 2,
        "n_latents": 3,
        "k": None,
        "n_tokens": 10,
        "nmse": 0.5,
        "n2g_latents": [7],
        "n2g_eligible_fraction": 1.0,
        "n2g_unexplained_fraction": 0.0,
        "setting_n2g_max_length": 4,
    }
    explanation = {"latent": 7, "ngrams": [["a|b", None, "`\n"]], "precision": None, "recall": 0.25}
    card = render_card(figures, explanations=[explanation])
    assert "| 7 | `a¦b∗´↵` | - | 0.2500 |" in card
