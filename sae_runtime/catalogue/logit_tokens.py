"""The tokens that every latent makes more and less likely by itself, without the layers between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_runtime.kernels.topk import topk_of_rows
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.progress import ProgressMeter

_TILE_ELEMENTS = 1 << 23  # logits that exist at once, 32 MB


@dataclass(frozen=True, eq=False)
class LogitTokens:
    """The m tokens at both ends of every latent's logits."""

    promoted: npt.NDArray[np.int64]
    """[n_latents, m], the largest first."""
    promoted_change: npt.NDArray[np.float32]
    suppressed: npt.NDArray[np.int64]
    """[n_latents, m], the smallest first."""
    suppressed_change: npt.NDArray[np.float32]


@torch.no_grad()
def logit_tokens(
    backbone: Backbone, site: Site, decoder: Tensor, count: int, progress: ProgressMeter | None = None
) -> LogitTokens:
    """The direct effect of decoder rows [n_latents, d] at a site on the logits (`Backbone.direct_logits`), in tiles.

    Changes are for an activation of 1, less their mean over the vocabulary, which changes no probability. They compare
    within a latent: by how much a token's logit really moves depends on the size of the final layer norm's input.
    """
    count = min(count, backbone.vocab_size)
    n_rows = max(1, _TILE_ELEMENTS // backbone.vocab_size)
    tables: list[list[Any]] = [[], [], [], []]
    for start in range(0, len(decoder), n_rows):
        rows = decoder[start : start + n_rows]
        logits = backbone.direct_logits(site, rows)
        logits -= logits.mean(1, keepdim=True)
        for i, sign in enumerate((1, -1)):
            values, tokens = topk_of_rows(sign * logits, count)
            tables[2 * i].append(tokens.cpu().numpy())
            tables[2 * i + 1].append(sign * values.float().cpu().numpy())
        if progress is not None:
            progress.reach(start + len(rows))
    return LogitTokens(*(np.concatenate(table) for table in tables))
