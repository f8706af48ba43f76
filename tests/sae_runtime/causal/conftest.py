"""A tiny GPT-2 in float64 twice, ours and Hugging Face's with plain forward hooks, and dictionaries for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_runtime import Backbone, Dictionary, LatentStatistics
from sae_runtime.causal.ablation import strongest_features, total_activation
from sae_runtime.causal.report import FeatureId
from sae_runtime.dictionary.dictionary import Activation

N_LATENTS, K = 24, 5
Replace = Callable[[Tensor, Tensor], Tensor]
"""From a feature's activations [T] and the tokens' positions [T] to what replaces them [T]."""


def make_dictionary(site: str, d_in: int, activation: Activation, seed: int) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    positive = normal(N_LATENTS).abs()
    return Dictionary(
        encoder=normal(N_LATENTS, d_in) / d_in**0.5,
        decoder=normal(N_LATENTS, d_in) / d_in**0.5,
        pre_bias=0.1 * normal(d_in),
        latent_bias=0.1 * normal(N_LATENTS),
        activation=activation,
        k=K if activation == "topk" else None,
        threshold=normal(N_LATENTS).abs() / 4 if activation == "jumprelu" else None,
        normalization="layer_norm" if activation == "topk" else "none",
        site=site,
        name=site,
        statistics=LatentStatistics(
            positive, positive * 0.3, positive, positive + 1, torch.zeros(N_LATENTS, 1), torch.tensor([0.5]), 100
        ),
    )


@pytest.fixture(scope="session")
def backbone64(tiny_backbone_folder: Path) -> Backbone:
    return Backbone.load(tiny_backbone_folder, dtype="float64")


@pytest.fixture(scope="session")
def dictionaries64() -> dict[str, Dictionary]:
    return {
        "stream": make_dictionary("0.resid_post_mlp", 16, "topk", seed=1),
        "neurons": make_dictionary("0.mlp_post_act", 64, "relu", seed=2),
        "attention": make_dictionary("1.resid_delta_attn", 16, "jumprelu", seed=3),
    }


class HookedModel:
    """Hugging Face's GPT-2 with one feature replaced by a forward hook; one text at a time."""

    def __init__(self, folder: Path, dictionaries: Mapping[str, Dictionary]) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(folder, use_safetensors=True).double().eval()
        self.dictionaries = dictionaries

    @torch.no_grad()
    def logits(
        self, row: Sequence[int], replacements: Sequence[tuple[str, int, Replace]] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [T, vocab], and the unedited activations [T] of each replaced feature."""
        seen: list[Tensor] = []
        handles = []
        for name, feature, replace in replacements:
            layer, location = str(self.dictionaries[name].site).split(".")
            block = self.model.transformer.h[int(layer)]
            module = {"resid_post_mlp": block, "mlp_post_act": block.mlp.act, "resid_delta_attn": block.attn}[location]

            def hook(_: object, __: object, output, name=name, feature=feature, replace=replace):
                h = output[0] if isinstance(output, tuple) else output
                z, std = latents(self.dictionaries[name], h[0])
                seen.append(z[:, feature])
                change = replace(z[:, feature], torch.arange(len(row))) - z[:, feature]
                edited = h + (std * change[:, None] * self.dictionaries[name].decoder[feature])[None]
                return (edited, *output[1:]) if isinstance(output, tuple) else edited

            handles.append(module.register_forward_hook(hook))
        try:
            return self.model(torch.tensor([list(row)])).logits[0], seen
        finally:
            for handle in handles:
                handle.remove()


def latents(dictionary: Dictionary, h: Tensor) -> tuple[Tensor, Tensor]:
    """All latents [T, n] by the equations, and the scale of the input [T, 1]."""
    std = torch.ones(len(h), 1, dtype=h.dtype)
    x = h
    if dictionary.normalization == "layer_norm":
        std = h.std(1, keepdim=True)
        x = (h - h.mean(1, keepdim=True)) / (std + 1e-5)
    z = (x - dictionary.pre_bias) @ dictionary.encoder.T + dictionary.latent_bias
    if dictionary.k is not None:
        kept = z.topk(dictionary.k, dim=1).indices
        z = torch.zeros_like(z).scatter(1, kept, z.gather(1, kept))
    if dictionary.threshold is not None:
        z = z * (z > dictionary.threshold)
    return z.relu(), std


@pytest.fixture(scope="session")
def hooked(tiny_backbone_folder: Path, dictionaries64: dict[str, Dictionary]) -> HookedModel:
    return HookedModel(tiny_backbone_folder, dictionaries64)


@pytest.fixture(scope="session")
def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 257, (n,), generator=generator).tolist() for n in (9, 20, 2, 13)]


@pytest.fixture(scope="session")
def features(backbone64: Backbone, dictionaries64: dict[str, Dictionary], rows: list[list[int]]) -> list[FeatureId]:
    totals = total_activation(backbone64, dictionaries64, rows)
    return [feature for name in totals for feature in strongest_features({name: totals[name]}, 3)]
