"""Initial weights of a TopK dictionary (Gao et al. 2024, appendix A, and OpenAI's released trainer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MEDIAN_SAMPLES = 32_768


def geometric_median(points: Tensor, *, tolerance: float = 1e-5, max_iterations: int = 100) -> Tensor:
    """The point [d] whose summed distance to `points` [n, d] is least, by Weiszfeld's iteration from their mean.

    Stops when a step is shorter than `tolerance` times the points' mean distance.
    """
    points = points.float()
    median = points.mean(0)
    for _ in range(max_iterations):
        distances = torch.linalg.vector_norm(points - median, dim=1)
        # A point exactly at the estimate would get infinite weight; the bound only limits how fast others pull away.
        weights = 1 / distances.clamp_min(1e-10)
        moved = weights @ points / weights.sum()
        step = torch.linalg.vector_norm(moved - median)
        median = moved
        if step <= tolerance * distances.mean():
            break
    return median


def unit_rows(matrix: Tensor) -> Tensor:
    """The rows of [n, d], each divided by its norm."""
    return F.normalize(matrix, dim=1, eps=1e-12)


def tied_directions(n_latents: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Random unit directions [n_latents, d_in], the start of both encoder and decoder."""
    return unit_rows(torch.randn(n_latents, d_in, generator=generator))


def encoder_scale(directions: Tensor, k: int, generator: torch.Generator, *, probes: int = 256) -> float:
    """Factor on the encoder that makes reconstructions of unit vectors as long as they are.

    Random unit probes around pre_bias are encoded and decoded with unit directions [n, d]; a TopK dictionary with tied
    unit weights returns them too long (many latents overlap), and the mean length found is divided out.
    """
    x = unit_rows(torch.randn(probes, directions.shape[1], generator=generator)).to(directions)
    values, indices = torch.topk(x @ directions.T, k, dim=1)
    reconstruction = F.embedding_bag(indices, directions, per_sample_weights=values.relu(), mode="sum")
    return 1 / float(torch.linalg.vector_norm(reconstruction, dim=1).mean())
