"""Products are the same products, whichever way they are computed."""

import pytest
import torch
from torch import Tensor

from sae_runtime.kernels import products
from sae_runtime.kernels.products import WEIGHT_FIRST, CpuKind, cpu_kind, default_compute_dtype, linear


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("kind", WEIGHT_FIRST)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 16, 64, 65, 1100])
def test_every_number_of_rows_gives_the_product(monkeypatch: pytest.MonkeyPatch, n: int, kind: CpuKind) -> None:
    monkeypatch.setattr(products, "cpu_kind", lambda: kind)
    x, weight, bias = random_tensors((n, 24), (40, 24), (40,))
    torch.testing.assert_close(linear(x, weight, bias), x @ weight.T + bias)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    memory = torch.full((n * 40 + 7,), 5.0)
    result = linear(x, weight, bias, memory)
    torch.testing.assert_close(result, x @ weight.T + bias)
    assert n == 0 or result.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert memory[n * 40 :].tolist() == [5.0] * 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x, weight, bias = torch.ones(5, 8, dtype=dtype), torch.ones(6, 8, dtype=dtype), torch.ones(6, dtype=dtype)
    assert linear(x, weight, bias).tolist() == [[9.0] * 6] * 5


@pytest.mark.parametrize("n", [1, 2, 16])
def test_bfloat16_rounds_each_result_once(n: int) -> None:
    """Which the bounds of screened_topk rest on: sums are in float32."""
    generator = torch.Generator().manual_seed(n)
    x, weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((n, 600), (700, 600), (700,)))
    exact = x.double() @ weight.double().T + bias.double()
    found = linear(x, weight, bias).double()
    terms = x.double().abs() @ weight.double().T.abs() + bias.double().abs()
    assert bool(((found - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * terms).all())


def test_gradients_reach_the_input() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(6, 8)
    linear(x, weight, torch.zeros(6)).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 8))


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
