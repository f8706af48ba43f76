"""Weighted sums of decoder rows: the decoder applied to sparse features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reference_decode(indices: Tensor, values: Tensor, decoder: Tensor) -> Tensor:
    """What `sparse_decode` computes, through the dense latents."""
    dense = values.new_zeros(indices.shape[0], decoder.shape[0])
    return dense.scatter_add_(1, indices.clamp_min(0), values) @ decoder


def sparse_decode(indices: Tensor, values: Tensor, decoder: Tensor) -> Tensor:
    """Sum over j of values[i, j] * decoder[indices[i, j]] for every row i.

    indices int64 [n, k] (-1 padding), values [n, k] (0 at the padding), decoder [n_latents, d_in] -> [n, d_in].
    Gradients reach `values`.
    """
    n, k = indices.shape
    if n == 0 or k == 0:
        return values.new_zeros(n, decoder.shape[1])
    listed = indices >= 0
    per_row = listed.sum(dim=1)
    if 2 * int(per_row.sum()) >= n * k:  # mostly filled: the padding reads row 0 with weight 0
        return F.embedding_bag(indices.clamp_min(0), decoder, per_sample_weights=values, mode="sum")
    # One long row must not make every other row read as many decoder rows as it does.
    starts = per_row.cumsum(dim=0) - per_row
    return F.embedding_bag(indices[listed], decoder, starts, per_sample_weights=values[listed], mode="sum")
