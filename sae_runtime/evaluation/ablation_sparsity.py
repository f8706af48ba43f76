"""How few logits a single latent moves: sparsity of the effects of ablating it (Gao et al. 2024, section 4.4).

At one token of a window one active latent is set to zero, with the dictionary's error left in place. The effect is the
change of the logits at that token and the later ones, [horizon, vocab], less its median over the vocabulary at each
token (a constant added to all logits changes nothing). Its sparsity is (L1 / L2)² / (horizon · vocab): the share of
entries that would carry the effect if they carried it equally; 1 for an effect spread evenly, near 0 for a sparse one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.evaluation.baselines import Baselines, to_inner, to_outer
from sae_runtime.evaluation.intervals import bootstrap_interval, generator
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site
from sae_runtime.progress import ProgressMeter

Array = npt.NDArray[np.float64]
_BINS = 24
_LOWEST = -3  # log10 of the least sparsity shown apart


def effect_sparsity(effect: Tensor) -> float | None:
    """(L1 / L2)² / size of a change of logits [horizon, vocab], less its medians; None if nothing changes."""
    change = effect.double()
    change = change - change.median(dim=-1, keepdim=True).values
    square = float(change.square().sum())
    if square == 0:
        return None
    return float(change.abs().sum()) ** 2 / square / change.numel()


@torch.no_grad()
def ablation_sparsity(
    backbone: Backbone,
    dictionary: Dictionary,
    site: Site,
    windows: Sequence[Sequence[int]],
    horizon: int,
    *,
    latents_per_window: int,
    baselines: Baselines | None,
    seed: int,
    tokens_per_pass: int = 2_048,
    progress: ProgressMeter | None = None,
) -> dict[str, list[list[float]]]:
    """Sparsities of each window's effects, by what is ablated.

    "latent": up to `latents_per_window` of the latents active at the token; with `baselines` as many "channel"s
    (coordinates of the activation, set to their mean) and "component"s (the strongest principal ones, likewise).

    Args:
        windows: token ids, all of one length; the token is the first of the last `horizon`.
    """
    effects: dict[str, list[list[float]]] = {"latent": []}
    if baselines is not None:
        effects |= {"channel": [], "component": []}
    rng = generator(seed, "ablation choices")
    for done, window in enumerate(windows, 1):
        at = len(window) - horizon
        x = _activations(backbone, site, window)[at : at + 1]  # (1, d)
        features = dictionary.encode(x.float())
        deltas = {"latent": _latent_deltas(dictionary, features, latents_per_window, rng)}
        if baselines is not None:
            inner = to_inner(x, features.input_statistics)
            drawn = torch.from_numpy(rng.permutation(x.shape[1])[:latents_per_window]).to(x.device)
            strongest = baselines.components[:latents_per_window]
            centred = inner - baselines.inner_mean
            # Row i leaves out coordinate i, or component i.
            channels = torch.zeros(len(drawn), x.shape[1], device=x.device)
            channels[torch.arange(len(drawn)), drawn] = centred[0, drawn]
            components = (centred @ strongest.T).T * strongest
            for name, removed in (("channel", channels), ("component", components)):
                without = to_outer(inner - removed, features.input_statistics)
                deltas[name] = without - to_outer(inner, features.input_statistics)
        changed = _changed_logits(backbone, site, window, at, torch.cat(list(deltas.values())), tokens_per_pass)
        by_kind = changed.split([len(kind_deltas) for kind_deltas in deltas.values()])
        for name, changes in zip(deltas, by_kind, strict=True):
            sparsities = [effect_sparsity(change) for change in changes]
            effects[name].append([sparsity for sparsity in sparsities if sparsity is not None])
        if progress is not None:
            progress.reach(done)
    return effects


def ablation_figures(effects: dict[str, list[list[float]]], *, seed: int, resamples: int) -> dict[str, Any]:
    """Means with intervals that resample windows, and histograms over the decades of sparsity."""
    edges = np.linspace(_LOWEST, 0, _BINS + 1)
    figures: dict[str, Any] = {"ablation_log10_edges": edges.tolist()}
    for name, windows in effects.items():
        flat = np.array([value for window in windows for value in window])
        if len(flat) == 0:
            continue
        sums, sizes = [sum(window) for window in windows], [len(window) for window in windows]
        low, high = bootstrap_interval(sums, sizes, seed=seed, purpose=f"ablation {name}", resamples=resamples)
        figures |= {
            f"ablation_{name}_sparsity_mean": float(flat.mean()),
            f"ablation_{name}_sparsity_mean_low": low,
            f"ablation_{name}_sparsity_mean_high": high,
            f"ablation_{name}_sparsity_median": float(np.median(flat)),
            f"ablation_{name}_n_effects": len(flat),
            f"ablation_{name}_counts": np.histogram(np.log10(flat).clip(_LOWEST, 0), edges)[0].tolist(),
        }
    return figures


def _latent_deltas(
    dictionary: Dictionary, features: SparseFeatures, n_latents: int, rng: np.random.Generator
) -> Tensor:
    """[m, d], what setting each of up to n_latents active latents of the one row to zero adds to the activation."""
    active = (features.indices[0] >= 0).nonzero()[:, 0].cpu().numpy()
    drawn = np.sort(rng.permutation(active)[:n_latents])
    if len(drawn) == 0:
        return torch.zeros(0, dictionary.d_in, device=features.values.device)
    copies = features[torch.zeros(len(drawn), dtype=torch.int64, device=features.indices.device)]
    values = copies.values.clone()
    values[torch.arange(len(drawn)), torch.from_numpy(drawn)] = 0
    without = replace(copies, values=values)
    return (dictionary.decode(without) - dictionary.decode(copies)).float()


def _activations(backbone: Backbone, site: Site, window: Sequence[int]) -> Tensor:
    return backbone.forward(PackedTokens.from_rows([window]), capture=[site]).activations[site]


def _changed_logits(
    backbone: Backbone, site: Site, window: Sequence[int], at: int, deltas: Tensor, tokens_per_pass: int
) -> Tensor:
    """[m, horizon, vocab], the logits from token `at` on with each delta added there, less those without any."""
    rows = max(1, tokens_per_pass // len(window) - 1)
    differences = []
    for chunk in deltas.split(rows):
        # The unchanged row runs in the same batch, so that rounding differs as little as possible.
        packed = PackedTokens.from_rows([window] * (len(chunk) + 1))
        places = torch.arange(1, len(chunk) + 1, device=chunk.device) * len(window) + at

        def edit(_: Site, x: Tensor, chunk: Tensor = chunk, places: Tensor = places) -> Tensor:
            return x.index_add(0, places, chunk.to(x))

        logits = backbone.forward(packed, edit=edit, edit_sites=[site], logits="all").logits
        assert logits is not None
        tail = logits.view(len(chunk) + 1, len(window), -1)[:, at:].cpu()
        differences.append(tail[1:] - tail[:1])
    return torch.cat(differences) if differences else torch.zeros(0, len(window) - at, backbone.vocab_size)
