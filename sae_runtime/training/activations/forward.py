"""Activations of the backbone at several sites, read from rows of tokens in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from sae_runtime.model.backbone import Backbone
from sae_runtime.model.packed import PackedTokens
from sae_runtime.model.sites import Site


def read_activations(
    backbone: Backbone, sites: Sequence[Site], rows: Sequence[Sequence[int]], *, skip_first: bool = False
) -> dict[Site, Tensor]:
    """[n, width] activations of each site in the backbone's dtype, tokens in reading order, of one forward pass.

    Args:
        rows: token ids, each at most the backbone's context length.
        skip_first: leave out every row's first token (a prepended end-of-text).
    """
    packed = PackedTokens.from_rows(rows).to(backbone.device)
    with torch.no_grad():
        captured = backbone.forward(packed, capture=sites).activations
    if skip_first:
        kept = packed.positions > 0
        return {site: captured[site][kept] for site in sites}
    return {site: captured[site] for site in sites}


def text_tokens(rows: Sequence[Sequence[int]], *, skip_first: bool) -> list[int]:
    """The token ids that `read_activations` gives activations of, in the same order."""
    return list(chain.from_iterable(row[1:] if skip_first else row for row in rows))
