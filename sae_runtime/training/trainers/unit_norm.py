"""The decoder's unit sphere: rows of norm 1, and gradients along the sphere. In place, block by block.

A block of rows stays in the CPU's cache over the passes that each operation takes, which is some four times faster than
whole-matrix expressions with their temporaries.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 1 << 18}


def _blocks(matrix: Tensor) -> range:
    elements = _BLOCK_ELEMENTS.get(matrix.device.type, matrix.numel())
    return range(0, len(matrix), max(1, elements // matrix.shape[1]))


@torch.no_grad()
def remove_radial_component_(gradient: Tensor, decoder: Tensor) -> None:
    """Takes from each row of `gradient` [n, d] its component along the unit row of `decoder` [n, d].

    Growing a row would be undone by the next normalisation, but would count in the gradient's norm and Adam's moments.
    """
    blocks = _blocks(decoder)
    for start in blocks:
        rows = slice(start, start + blocks.step)
        g, w = gradient[rows], decoder[rows]
        g.addcmul_((g * w).sum(1, keepdim=True), w, value=-1)


@torch.no_grad()
def normalize_rows_(matrix: Tensor) -> None:
    """Divides each row of [n, d] by its norm; a row of zeros stays."""
    blocks = _blocks(matrix)
    for start in blocks:
        w = matrix[start : start + blocks.step]
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min_(1e-12))
