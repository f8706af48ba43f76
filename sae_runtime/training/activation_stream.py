"""Activations of the backbone at one site, read from rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from sae_runtime.backbone import Backbone
from sae_runtime.packed import PackedTokens
from sae_runtime.sites import Site


def activation_chunks(
    backbone: Backbone,
    site: Site,
    rows: Iterator[list[int]],
    *,
    tokens_per_pass: int,
    context_length: int,
    skip_first: bool = False,
) -> Iterator[Tensor]:
    """Yields [n, width] activations in the backbone's dtype, tokens in reading order, of as many rows as fit a pass.

    Args:
        tokens_per_pass: most tokens in one forward pass; at least one row is read.
        context_length: most tokens in a row.
        skip_first: leave out every row's first token (a prepended end-of-text).
    """
    rows_per_pass = max(1, tokens_per_pass // context_length)
    while batch := list(islice(rows, rows_per_pass)):
        packed = PackedTokens.from_rows(batch).to(backbone.device)
        with torch.no_grad():
            activations = backbone.forward(packed, capture=[site]).activations[site]  # (N, width)
        yield activations[packed.positions > 0] if skip_first else activations
