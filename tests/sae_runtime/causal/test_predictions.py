"""Divergences against float64."""

from __future__ import annotations

import torch

from sae_runtime.causal.predictions import divergence


def test_divergence_keeps_small_values_and_bears_large_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 50, generator=generator, dtype=torch.float64)
    moved = logits + 1e-4 * torch.randn(3, 50, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(-1), moved.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    divergences = divergence(p.float(), q.float(), torch.arange(3))
    torch.testing.assert_close(divergences.double(), expected, rtol=0.02, atol=0)  # about 1e-9 from float32 inputs
    one_hot = torch.tensor([[0.0, -300.0], [-300.0, 0.0]])
    torch.testing.assert_close(divergence(one_hot, one_hot.flip(0), torch.arange(2)), torch.tensor([300.0, 300.0]))
