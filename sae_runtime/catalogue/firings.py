"""Where latents fire in one pass, as flat arrays that every collector reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sae_runtime.dictionary.features import SparseFeatures

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Firings:
    """The F positive activations on n tokens, ascending by token and, within a token, by latent."""

    n_tokens: int
    n_latents: int
    token: Integers
    """[F]."""
    latent: Integers
    """[F]."""
    value: npt.NDArray[np.float32]
    """[F]."""

    @classmethod
    def of(cls, features: SparseFeatures, is_text: npt.NDArray[np.bool_]) -> Firings:
        """Those on the tokens [N] of a pass that are text, which are numbered among themselves."""
        positive = (features.values > 0) & torch.from_numpy(is_text).to(features.values.device)[:, None]
        token = positive.nonzero(as_tuple=True)[0].cpu().numpy()
        latent = features.indices[positive].cpu().numpy()
        value = features.values[positive].float().cpu().numpy()
        token = (np.cumsum(is_text) - 1)[token]
        order = np.argsort(token * features.n_latents + latent)
        return cls(int(is_text.sum()), features.n_latents, token[order], latent[order], value[order])

    @cached_property
    def _key(self) -> Integers:
        """[F], ascending."""
        return self.token * self.n_latents + self.latent

    @cached_property
    def splits(self) -> Integers:
        """[n_tokens + 1]: the firings of token t are splits[t] to splits[t + 1]."""
        return np.searchsorted(self.token, np.arange(self.n_tokens + 1))

    def at(self, tokens: Integers, latents: Integers) -> npt.NDArray[np.float32]:
        """Activations of latents on tokens (arrays of one shape), 0 where a latent is silent."""
        if not len(self._key):
            return np.zeros(np.broadcast_shapes(tokens.shape, latents.shape), np.float32)
        key = tokens * self.n_latents + latents
        place = np.searchsorted(self._key, key).clip(max=len(self._key) - 1)
        return np.where(self._key[place] == key, self.value[place], np.float32(0))
