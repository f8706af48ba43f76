"""Products for few rows are the same products, whichever way they are computed."""

import pytest
import torch

from sae_runtime.kernels import products as module
from sae_runtime.kernels.products import Linear, cpu_kind, default_compute_dtype, few_rows_linear


@pytest.mark.parametrize("n", [0, 1, 2, 3, 16, 64, 65, 200])
@pytest.mark.parametrize("small", [True, False])
def test_every_number_of_rows_gives_the_product(monkeypatch: pytest.MonkeyPatch, n: int, small: bool) -> None:
    if not small:
        monkeypatch.setattr(module, "SMALL_BYTES", 0)
    generator = torch.Generator().manual_seed(n)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((n, 24), (24, 40), (40,)))
    linear = Linear(weight, bias)
    torch.testing.assert_close(linear(x), x @ weight + bias)
    torch.testing.assert_close(few_rows_linear(x, linear.weight), x @ weight)
    assert linear.nbytes == 4 * (24 * 40 + 40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x, weight, bias = torch.ones(5, 8, dtype=dtype), torch.ones(8, 6, dtype=dtype), torch.ones(6, dtype=dtype)
    assert Linear(weight, bias)(x).tolist() == [[9.0] * 6] * 5


@pytest.mark.parametrize("n", [1, 2, 16])
def test_bfloat16_rounds_each_result_once(n: int) -> None:
    """Which the bounds of screened_topk rest on: sums are in float32."""
    generator = torch.Generator().manual_seed(n)
    x, weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((n, 600), (700, 600), (700,)))
    exact = x.double() @ weight.double().T + bias.double()
    found = few_rows_linear(x, weight, bias).double()
    terms = x.double().abs() @ weight.double().T.abs() + bias.double().abs()
    assert bool(((found - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * terms).all())


def test_gradients_reach_the_input() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    linear = Linear(torch.randn(8, 6), torch.zeros(6))
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(5, 8))


@pytest.mark.parametrize(
    ("capability", "amx", "bfloat16", "kind", "dtype"),
    [
        ("AVX512", True, True, "amx", torch.bfloat16),
        ("AVX512", False, True, "avx512_bf16", torch.bfloat16),
        ("AVX512", False, False, "avx512", torch.float32),
        ("AVX2", True, True, "avx2", torch.float32),  # as ATEN_CPU_CAPABILITY=avx2 makes any CPU
        ("DEFAULT", False, False, "other", torch.float32),
    ],
)
def test_bfloat16_is_the_default_only_where_the_cpu_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, amx: bool, bfloat16: bool, kind: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    cpu_kind.cache_clear()
    try:
        assert cpu_kind() == kind
        assert default_compute_dtype("cpu") == dtype
    finally:
        cpu_kind.cache_clear()
