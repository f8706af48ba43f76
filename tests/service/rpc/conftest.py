"""A server with a dictionary of every family that is not a plain TopK or ReLU."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae_runtime import Dictionary
from service.replica import ReplicaSettings
from tests.builders import N_LATENTS, random_dictionary
from tests.service.conftest import LIMITS, Served, serve

SITE, WIDTH = "1.resid_post_mlp", 32


def family_dictionaries() -> dict[str, Dictionary]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    relu = random_dictionary(SITE, WIDTH, k=None, normalize=False, seed=1)
    topk = random_dictionary(SITE, WIDTH, k=8, normalize=False, seed=2)
    families = {
        "jumprelu": replace(relu, activation="jumprelu", threshold=normal(N_LATENTS), output_bias=normal(WIDTH)),
        "gated": replace(
            relu, activation="gated", magnitude_scale=normal(N_LATENTS).exp(), magnitude_bias=normal(N_LATENTS)
        ),
        "groupmax": replace(topk, activation="groupmax", normalization="constant_norm"),
        "skip": replace(topk, skip=normal(WIDTH, WIDTH)),
        "transcoder": replace(topk, transcoder=True),
    }
    return {name: replace(dictionary, name=name) for name, dictionary in families.items()}


@pytest.fixture
async def families() -> AsyncIterator[Served]:
    async for server in serve(ReplicaSettings(limits=LIMITS), dictionaries=family_dictionaries()):
        yield server
