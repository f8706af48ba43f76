"""The tiled encoder kernels against the dense computation: values, order, ties, tiling, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.kernels import measure_peak
from sae_runtime.kernels.active import LatentActivation, reference_active, tiled_active
from sae_runtime.kernels.groupmax import reference_groupmax, tiled_groupmax
from sae_runtime.kernels.topk import reference_topk, tiled_topk, topk_of_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random_layer(rows: int, n_latents: int, d_in: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, d_in), (n_latents, d_in), (n_latents,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, -9.0])  # -9: no positive value
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize(("n_latents", "k"), [(96, 8), (96, 96), (1000, 1), (4100, 32), (9000, 4)])
def test_rows_of_dense_values_equal_a_stable_sort(
    n_latents: int, k: int, shift: float, by_column: bool, dtype: torch.dtype
) -> None:
    """The selection alone, on given values, so that no rounding of the matrix product comes in."""
    x = torch.randn(17, n_latents, generator=torch.Generator().manual_seed(k)) + shift
    x[3, ::2] = 0.0
    x[3, 1::4] = -0.0
    x = x.to(dtype)
    if by_column:
        x = x.t().contiguous().t()
    values, indices = x.sort(dim=-1, descending=True, stable=True)
    found, where = topk_of_rows(x, k)
    assert torch.equal(found, values[:, :k])
    assert torch.equal(where, indices[:, :k])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_dense_reference_for_any_tiling(dtype: torch.dtype) -> None:
    # Small integers make every product exact in every dtype, and ties frequent.
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in ((37, 12), (1003, 12)))
    bias = torch.randint(-3, 4, (1003,), generator=generator).to(dtype)
    for relu in (False, True):
        expected = reference_topk(x, weight, bias, 20, relu=relu)
        for tile_rows, tile_latents in ((None, None), (5, 1003), (37, 15), (8, 333), (1, 64)):
            found = tiled_topk(x, weight, bias, 20, relu=relu, tile_rows=tile_rows, tile_latents=tile_latents)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=300), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_ties_go_to_the_lowest_latent(values: list[int], k: int) -> None:
    k = min(k, len(values))
    row = torch.tensor([values], dtype=torch.float32)
    found, where = topk_of_rows(row, k)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert where[0].tolist() == expected
    assert found[0].tolist() == [values[i] for i in expected]


def test_random_weights_agree_with_float64() -> None:
    x, weight, bias = random_layer(50, 8192, 64, torch.float32)
    values, indices = tiled_topk(x, weight, bias, 32, relu=True)
    exact = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(values.double(), exact.gather(1, indices), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.double(), exact.topk(32).values, rtol=1e-5, atol=1e-5)


def test_bfloat16_chooses_among_values_that_agree_to_its_precision() -> None:
    x, weight, bias = random_layer(50, 4096, 64, torch.float32)
    values, indices = tiled_topk(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 32)
    pre = x.bfloat16().double() @ weight.bfloat16().double().T + bias.bfloat16().double()
    kth = pre.topk(32).values[:, -1:]
    # Rounding moves a value by at most 2^-8 of itself (the matrix product accumulates in float32).
    assert (pre.gather(1, indices) >= kth * (1 - 2**-7)).all()
    torch.testing.assert_close(values.double(), pre.gather(1, indices), rtol=2**-7, atol=1e-6)


def test_fewer_positive_than_k_are_padded() -> None:
    weight = -torch.eye(4)
    values, indices = tiled_topk(torch.tensor([[1.0, -2.0, 3.0, -4.0]]), weight, torch.zeros(4), 3, relu=True)
    assert indices.tolist() == [[3, 1, -1]]
    assert values.tolist() == [[4.0, 2.0, 0.0]]


def test_no_rows() -> None:
    _, weight, bias = random_layer(1, 96, 16, torch.float32)
    values, indices = tiled_topk(torch.zeros(0, 16), weight, bias, 8)
    assert values.shape == indices.shape == (0, 8)
    values, indices = tiled_active(torch.zeros(0, 16), weight, LatentActivation(bias))
    assert values.shape == indices.shape == (0, 0)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_active_latents_equal_the_dense_reference_for_any_tiling(dtype: torch.dtype, kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in ((37, 12), (203, 12)))
    bias, threshold, scale, shift = (
        torch.randint(low, high, (203,), generator=generator).to(dtype)
        for low, high in ((-30, 4), (-3, 9), (1, 4), (-9, 9))
    )
    activation = {
        "relu": LatentActivation(bias),
        "jumprelu": LatentActivation(bias, threshold),
        "gated": LatentActivation(bias, magnitude_scale=scale, magnitude_bias=shift),
    }[kind]
    expected = reference_active(x, weight, activation)
    by_hand = x @ weight.T + bias
    gate, value = by_hand > (threshold if kind == "jumprelu" else 0), by_hand
    if kind == "gated":
        value = (by_hand - bias) * scale + shift
    dense = torch.zeros_like(by_hand).scatter_add_(1, expected[1].clamp_min(0), expected[0])
    assert torch.equal(dense, torch.where(gate, value, 0).relu())
    for tile_rows, tile_latents in ((None, None), (5, 203), (37, 15), (1, 64)):
        found = tiled_active(x, weight, activation, tile_rows=tile_rows, tile_latents=tile_latents)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_relu_without_any_active_latent_has_no_columns() -> None:
    x, weight, _ = random_layer(3, 96, 16, torch.float32)
    values, indices = tiled_active(x, weight, LatentActivation(torch.full((96,), -1e6)))
    assert values.shape == indices.shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 6, 96])
def test_groupmax_equals_the_dense_reference_for_any_tiling(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in ((37, 12), (96, 12)))
    bias = torch.randint(-30, 4, (96,), generator=generator).to(dtype)  # ties are frequent, silent groups too
    expected = reference_groupmax(x, weight, bias, k)
    for tile_elements in (1, 96, 5 * 96, 1 << 22):
        found = tiled_groupmax(x, weight, bias, k, tile_elements=tile_elements)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.any_cpu
def test_peak_memory_stays_far_below_the_dense_latents() -> None:
    """In a fresh process: 2,048 x 32,768 dense float32 latents alone are 268 MB."""
    tiled, dense = measure_peak(rows=2048, n_latents=32_768, d_in=16, k=32, dense=True)
    assert tiled < 120
    assert dense > 260  # the meter sees what it should
