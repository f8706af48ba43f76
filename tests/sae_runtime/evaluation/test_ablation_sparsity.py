"""Effects of single latents on logits against Hugging Face's own model in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_runtime import Backbone, Site
from sae_runtime.evaluation.ablation_sparsity import ablation_figures, ablation_sparsity, effect_sparsity
from sae_runtime.evaluation.baselines import fit_baselines
from tests.sae_runtime.evaluation.reference import FAMILIES, HookedModel, random_dictionary, random_rows

SITE = "0.resid_post_mlp"
HORIZON = 5


def sparsity_slowly(change: Tensor) -> float:
    """(L1 / L2)² / size, by its definition, median of the middle element (the lower of two)."""
    rows = []
    for row in change.tolist():
        middle = sorted(row)[(len(row) - 1) // 2]
        rows += [value - middle for value in row]
    l1, l2 = sum(abs(v) for v in rows), sum(v * v for v in rows) ** 0.5
    return (l1 / l2) ** 2 / len(rows)


def test_known_effects() -> None:
    one = torch.zeros(4, 100)
    one[2, 7] = -3.0
    assert effect_sparsity(one) == pytest.approx(1 / 400)
    assert effect_sparsity(one + torch.arange(4.0)[:, None]) == pytest.approx(1 / 400)  # constants change nothing
    assert effect_sparsity(torch.full((4, 100), 2.0)) is None
    halves = torch.ones(1, 99)
    halves[0, ::2] = -1.0
    halves[0, 0] = 0.0
    assert effect_sparsity(halves) == pytest.approx(sparsity_slowly(halves))
    noise = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert effect_sparsity(noise) == pytest.approx(sparsity_slowly(noise), rel=1e-6)
    assert effect_sparsity(noise * 1e-4) == pytest.approx(sparsity_slowly(noise), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalization", ["none", "centred", "layer_norm", "constant_norm"])
def test_every_active_latent(
    tiny_backbone_folder: Path, tiny_backbone: Backbone, family: str, normalization: str
) -> None:
    dictionary = random_dictionary(family, normalization=normalization)
    windows = random_rows(12, 12, seed=4)
    found = ablation_sparsity(
        tiny_backbone,
        dictionary,
        Site.parse(SITE),
        windows,
        HORIZON,
        latents_per_window=3,
        baselines=None,
        seed=0,
        tokens_per_pass=40,
    )
    assert list(found) == ["latent"]
    model, at = HookedModel(tiny_backbone_folder, SITE), 12 - HORIZON
    for row, values in zip(windows, found["latent"], strict=True):
        clean, x = model(row)
        z = dictionary.encode_dense(x[at : at + 1].float())[0].double()
        wide = x[at]
        std = {
            "none": torch.ones(()),
            "centred": torch.ones(()),
            "layer_norm": wide.std(),
            "constant_norm": wide.square().mean().sqrt(),
        }[normalization]
        expected = []
        for latent in (z > 0).nonzero()[:, 0].tolist():
            part = std * z[latent] * dictionary.decoder[latent].double()

            def without(x: Tensor, part: Tensor = part) -> Tensor:
                new = x.clone()
                new[at] -= part
                return new

            changed, _ = model(row, without)
            assert float((changed - clean)[:at].abs().max()) == 0
            expected.append(sparsity_slowly((changed - clean)[at:]))
        assert len(values) == min(3, len(expected))
        for value in values:
            assert min(abs(value / e - 1) for e in expected) < 2e-3


def test_coordinates_and_components(tiny_backbone_folder: Path, tiny_backbone: Backbone) -> None:
    dictionary = random_dictionary(normalization="none")
    windows = random_rows(12, seed=5)
    x = torch.cat([tiny_backbone.activations(torch.tensor([r]), sites=[SITE])[SITE][0] for r in random_rows(30, 30)])
    baselines = fit_baselines([(x, None, dictionary.encode(x))], 48, seed=0)
    found = ablation_sparsity(
        tiny_backbone,
        dictionary,
        Site.parse(SITE),
        windows,
        HORIZON,
        latents_per_window=16,
        baselines=baselines,
        seed=0,
    )
    model, at, mean = HookedModel(tiny_backbone_folder, SITE), 12 - HORIZON, x.double().mean(0)
    clean, _ = model(windows[0])
    channels, components = [], []
    for i in range(16):

        def channel(x: Tensor, i: int = i) -> Tensor:
            new = x.clone()
            new[at, i] = mean[i]
            return new

        def component(x: Tensor, i: int = i) -> Tensor:
            direction = baselines.components[i].double()
            new = x.clone()
            new[at] -= (x[at] - mean) @ direction * direction
            return new

        channels.append(sparsity_slowly((model(windows[0], channel)[0] - clean)[at:]))
        components.append(sparsity_slowly((model(windows[0], component)[0] - clean)[at:]))
    assert sorted(found["channel"][0]) == pytest.approx(sorted(channels), rel=5e-3)
    assert found["component"][0] == pytest.approx(components, rel=5e-3)


def test_figures_resample_windows() -> None:
    effects = {"latent": [[0.1, 0.3], [], [0.2]], "channel": [[], []]}
    figures = ablation_figures(effects, seed=0, resamples=200)
    assert figures["ablation_latent_sparsity_mean"] == pytest.approx(0.2)
    assert figures["ablation_latent_sparsity_median"] == pytest.approx(0.2)
    assert figures["ablation_latent_n_effects"] == 3
    assert sum(figures["ablation_latent_counts"]) == 3
    assert figures["ablation_latent_sparsity_mean_low"] == pytest.approx(0.2)
    assert not any(name.startswith("ablation_channel") for name in figures)
    assert np.diff(figures["ablation_log10_edges"]) == pytest.approx(3 / 24)
