"""Settings and activations that the tests of all trainers share."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.trainers import Trainer, new_trainer

D_IN, N_LATENTS = 16, 128

FAMILIES: dict[str, dict[str, Any]] = {
    "topk": {"family": "topk"},
    "multi_topk": {"family": "topk", "multi_topk_coefficient": 0.125},
    "batch_topk": {"family": "batch_topk"},
    "matryoshka": {"family": "matryoshka"},
    "relu": {"family": "relu"},
    "relu_decoder_norm": {"family": "relu_decoder_norm"},
    "jumprelu_l0": {"family": "jumprelu"},
    "jumprelu_tanh": {"family": "jumprelu", "jumprelu_penalty": "tanh"},
    "gated": {"family": "gated"},
}
"""Settings of every family and of the variants that have equations of their own."""


def config(**settings: Any) -> TrainingConfig:
    defaults: dict[str, Any] = {
        "site": "0.resid_post_mlp",
        "data": [Path("unused.txt")],
        "out": Path("unused"),
        "n_latents": N_LATENTS,
        "k": 4,
        "tokens": 64_000,
        "batch_tokens": 64,
        "aux_k": 8,
        "dead_after_tokens": 640,
        "compute_dtype": "float32",
        "learning_rate": 3e-3,
        "warmup_steps": 0,
        "decay_fraction": 0.0,
    }
    return TrainingConfig(**{**defaults, **settings})


def activations(n: int, seed: int = 0) -> Tensor:
    """Sparse combinations of 64 fixed directions, as a dictionary expects."""
    directions = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, 64, generator=generator) < 0.05
    strengths = chosen * (1 + torch.rand(n, 64, generator=generator))
    return strengths @ F.normalize(directions, dim=1) + 0.5 + 0.01 * torch.randn(n, D_IN, generator=generator)


def trainer(n_sample: int = 1000, **settings: Any) -> Trainer:
    return new_trainer(config(**settings), D_IN, activations(n_sample))


def perturbed(n_dead: int = 0, **settings: Any) -> Trainer:
    """A trainer away from the initial symmetry, with `n_dead` latents that count as dead."""
    made = trainer(500, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in made.parameters().items():
            if p.ndim == 1:
                p += 0.1 * torch.randn(p.shape, generator=generator)
            elif not (name == "decoder" and made.unit_decoder):
                p *= 1 + 0.3 * torch.rand(len(p), 1, generator=generator)
    dead = torch.arange(N_LATENTS) % 2 == 1
    dead &= dead.cumsum(0) <= n_dead
    made.tokens_since_fired[dead] = 10_000
    return made
