"""The normalisation of each input row before encoding, which decoding undoes.

    none           x' = x
    centred        x' = x - mean
    layer_norm     x' = (x - mean) / (std + eps)      std unbiased, eps = 1e-5 outside the root
    constant_norm  x' = x / rms                       rms = |x| / sqrt(d_in), so that |x'| = sqrt(d_in)

layer_norm is that of OpenAI's sparse_autoencoder and of SAELens. constant_norm is SAELens' constant_norm_rescale.
centred is for dictionaries of a model with centred writing weights (TransformerLens), whose residual stream is the raw
one without the mean of each row. All are undone by y = mean + std * y', where centred has std 1, and constant_norm has
mean 0 and std = rms. As in those projects, the eps is not put back. A row with std 0 (layer_norm) or rms 0
(constant_norm, where SAELens divides by zero) becomes zero and decodes to its mean.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sae_runtime.dictionary.features import InputStatistics

Normalization = Literal["none", "centred", "layer_norm", "constant_norm"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
LAYER_NORM_EPS = 1e-5


def normalize_rows(x: Tensor, normalization: Normalization) -> tuple[Tensor, InputStatistics | None]:
    """Normalised rows of x [n, d_in], and the statistics for `restore_rows`; x itself and None for "none"."""
    if normalization == "none":
        return x, None
    if normalization in ("centred", "layer_norm"):
        mean = x.mean(dim=1, keepdim=True)
        x = x - mean
        if normalization == "centred":
            return x, InputStatistics(mean, torch.ones_like(mean))
        # The same as x.std, which takes several times longer.
        std = torch.linalg.vector_norm(x, dim=1, keepdim=True) / (x.shape[1] - 1) ** 0.5
        return x / (std + LAYER_NORM_EPS), InputStatistics(mean, std)
    rms = torch.linalg.vector_norm(x, dim=1, keepdim=True) / x.shape[1] ** 0.5
    # A row whose squares underflow has rms 0 and counts as zero too: its scale could not be restored.
    return torch.where(rms > 0, x / rms, 0), InputStatistics(torch.zeros_like(rms), rms)


def restore_rows(x: Tensor, statistics: InputStatistics) -> Tensor:
    """Normalised rows [n, d_in] in the units of the input, in the dtype of the statistics."""
    return torch.addcmul(statistics.mean, x.to(statistics.std.dtype), statistics.std)
