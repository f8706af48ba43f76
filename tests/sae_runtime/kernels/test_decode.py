"""The sparse decoder against a dense matrix product."""

import pytest
import torch

from sae_runtime.kernels.decode import reference_decode, sparse_decode


def random_features(fill: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    indices = torch.rand(20, 500, generator=generator).argsort(dim=1)[:, :40]
    values = torch.rand(20, 40, generator=generator)
    padding = torch.rand(20, 40, generator=generator) >= fill
    padding[7] = True  # a row without any active latent
    decoder = torch.randn(500, 24, generator=generator).to(dtype)
    return indices.masked_fill(padding, -1), values.masked_fill(padding, 0).to(dtype), decoder


@pytest.mark.parametrize("fill", [1.0, 0.7, 0.1])  # both code paths
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.15), (torch.float16, 0.02)],
)
def test_equals_the_dense_product(fill: float, dtype: torch.dtype, tolerance: float) -> None:
    indices, values, decoder = random_features(fill, dtype)
    expected = reference_decode(indices, values.double(), decoder.double())
    found = sparse_decode(indices, values, decoder)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < tolerance
    assert found[7].abs().max() == 0


def test_no_rows_and_no_columns() -> None:
    decoder = torch.randn(10, 4)
    assert sparse_decode(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), decoder).shape == (0, 4)
    assert torch.equal(
        sparse_decode(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0), decoder), torch.zeros(2, 4)
    )


@pytest.mark.parametrize("fill", [1.0, 0.1])
def test_gradients_reach_the_values(fill: float) -> None:
    indices, values, decoder = random_features(fill, torch.float64)
    weights = torch.randn(20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gradients = []
    for decode in (sparse_decode, reference_decode):
        leaf = values.clone().requires_grad_()
        (decode(indices, leaf, decoder) * weights).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.masked_fill(indices < 0, 0))
    torch.testing.assert_close(*gradients)
