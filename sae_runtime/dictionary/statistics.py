"""What is known about each latent of a dictionary from the tokens it was measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Per-latent figures over `n_tokens` tokens, in latent activation units; float32 on the host.

    `mean` and `mean_square` are over all tokens, zeros included; `quantiles` are over the tokens on which the latent is
    active (0 for a latent that never was), so that a rare latent's strength can be read off them.
    """

    firing_rate: Tensor  # [n_latents], share of tokens on which the latent is active, 0..1
    mean: Tensor  # [n_latents]; what ablate_mean sets
    mean_square: Tensor  # [n_latents]
    max: Tensor  # [n_latents], largest activation seen; the unit "max" of an edit
    quantiles: Tensor  # [n_latents, q]
    quantile_levels: Tensor  # [q], ascending, 0..1
    n_tokens: int

    def __post_init__(self) -> None:
        n_latents = self.firing_rate.shape[0]
        expected = {
            "firing_rate": (n_latents,),
            "mean": (n_latents,),
            "mean_square": (n_latents,),
            "max": (n_latents,),
            "quantiles": (n_latents, self.quantile_levels.numel()),
            "quantile_levels": (self.quantile_levels.numel(),),
        }
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"statistics: {name} has shape {list(found)}, expected {list(shape)}")

    @property
    def n_latents(self) -> int:
        return self.firing_rate.shape[0]

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors of `stats.safetensors`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "n_tokens"}
        stored = {name: tensor.to(torch.float32).cpu().contiguous() for name, tensor in tensors.items()}
        return stored | {"n_tokens": torch.tensor([self.n_tokens], dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LatentStatistics:
        """Inverse of `to_tensors`; ValueError names missing, unknown, misshapen or non-finite tensors."""
        names = {f.name for f in fields(cls)}
        if set(tensors) != names:
            raise ValueError(f"statistics: found tensors {sorted(tensors)}, expected {sorted(names)}")
        stored = {name: tensor.to(torch.float32) for name, tensor in tensors.items() if name != "n_tokens"}
        for name, tensor in stored.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"statistics: {name} holds NaN or infinite values")
        return cls(**stored, n_tokens=int(tensors["n_tokens"].item()))

    def __getitem__(self, latents: slice | Tensor) -> LatentStatistics:
        """The same figures for some of the latents."""
        kept = ("firing_rate", "mean", "mean_square", "max", "quantiles")
        return replace(self, **{name: getattr(self, name)[latents] for name in kept})
