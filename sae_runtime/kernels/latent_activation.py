"""Activations that look at each latent alone: ReLU, JumpReLU and gated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LatentActivation:
    """The value of m latents from the product p = x @ weight.T of their own encoder rows.

    ReLU      relu(p + bias)
    JumpReLU  relu(p + bias) where p + bias > threshold, else 0; a negative threshold acts as 0
    gated     relu(magnitude_scale * p + magnitude_bias) where p + bias > 0, else 0

    JumpReLU: Rajamanoharan et al. 2024, arXiv 2407.14435; gated: the same authors, arXiv 2404.16014, with
    magnitude_scale = exp(r_mag). All tensors are [m], of one dtype; the gated ones come together and without threshold.
    """

    bias: Tensor
    threshold: Tensor | None = None
    magnitude_scale: Tensor | None = None
    magnitude_bias: Tensor | None = None

    def __getitem__(self, latents: slice | Tensor) -> LatentActivation:
        """The activation of some of the latents."""
        parts = (self.bias, self.threshold, self.magnitude_scale, self.magnitude_bias)
        return LatentActivation(*(None if part is None else part[latents] for part in parts))  # type: ignore[arg-type]

    def before_relu(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """What the last ReLU reads: [n, m] for x [n, d_in] and weight [m, d_in]; positive exactly at active latents."""
        if self.magnitude_scale is None:
            pre = torch.addmm(self.bias, x, weight.T, out=out)
            return pre if self.threshold is None else pre.masked_fill_(pre <= self.threshold, 0)
        assert self.magnitude_bias is not None
        product = torch.mm(x, weight.T, out=out)
        closed = product <= -self.bias
        return torch.addcmul(self.magnitude_bias, product, self.magnitude_scale, out=product).masked_fill_(closed, 0)
