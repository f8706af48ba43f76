"""The top-k that is screened in bfloat16: the same as the dense float32 one, also where bfloat16 cannot tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_runtime import Dictionary, load_dictionary
from sae_runtime.kernels import screened_topk as kernel
from sae_runtime.kernels.screened_topk import Screen, can_screen, screened_topk
from sae_runtime.kernels.topk import reference_topk

K = 8
N_LATENTS, D = 1024, 48


def random_problem(n: int = 64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = scale * torch.randn(n, D, generator=generator)
    weight = torch.nn.functional.normalize(torch.randn(N_LATENTS, D, generator=generator), dim=1)
    return x, weight, 0.1 * torch.randn(N_LATENTS, generator=generator)


def whole_problem(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers: float32 sums are exact in any order, while bfloat16 does not hold those above 256."""
    generator = torch.Generator().manual_seed(n)
    shapes = (n, D), (N_LATENTS, D), (N_LATENTS,)
    x, weight, bias = (torch.randint(-500, 501, shape, generator=generator).float() for shape in shapes)
    return x, weight, bias


def check(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = True) -> None:
    """Same latents and values as a dense product in float64, rounded to float32 where values nearly tie."""
    values, indices = screened_topk(x, weight, bias, Screen.of(weight, bias), K, relu=relu)
    exact = x.double() @ weight.double().T + bias.double()
    expected = exact.topk(K).values
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(values.double(), expected, atol=2e-5, rtol=2e-5)
    listed = indices >= 0
    assert torch.equal(listed, values > 0 if relu else torch.ones_like(listed))
    torch.testing.assert_close(exact.gather(1, indices.clamp_min(0))[listed], expected[listed], atol=2e-5, rtol=2e-5)
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in indices)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_equals_the_dense_product(scale: float, relu: bool) -> None:
    x, weight, bias = random_problem(scale=scale)
    check(x, weight, bias, relu=relu)


def test_order_and_ties_are_those_of_the_reference() -> None:
    x, weight, bias = whole_problem(n=64)
    weight[512:], bias[512:] = weight[:512].clone(), bias[:512].clone()  # every latent twice: exact ties
    assert len(kernel._candidates(x, Screen.of(weight, bias), K)[0]) > 32  # most rows are screened
    found = screened_topk(x, weight, bias, Screen.of(weight, bias), K, relu=True)
    expected = reference_topk(x, weight, bias, K, relu=True)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_bfloat16_alone_would_choose_otherwise() -> None:
    """The screen matters: many latents differ by less than bfloat16 can tell."""
    x, weight, bias = random_problem(n=256)
    weight = weight[:1] + 1e-3 * weight  # all nearly the same direction
    check(x, weight, bias / 100)
    naive = (x.bfloat16() @ weight.bfloat16().T).float().topk(K).indices.sort().values
    exact = (x @ weight.T).topk(K).indices.sort().values
    assert (naive != exact).any(1).float().mean() > 0.5


@pytest.mark.parametrize("case", ["zero rows", "no positive values", "few positive values", "equal latents", "huge"])
def test_rows_that_cannot_be_screened(case: str) -> None:
    x, weight, bias = random_problem(n=32)
    if case == "zero rows":
        x[::3] = 0
    elif case == "no positive values":
        bias -= 100
    elif case == "few positive values":
        bias[3:] -= 100
    elif case == "equal latents":
        x, weight, bias = whole_problem(n=32)
        weight[:], bias[:] = weight[0], 1.0
    else:
        x *= 1e30
    values, indices = screened_topk(x, weight, bias, Screen.of(weight, bias), K, relu=True)
    expected = reference_topk(x, weight, bias, K, relu=True)
    torch.testing.assert_close(values, expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(indices >= 0, expected[1] >= 0)
    if case == "equal latents":
        assert torch.equal(indices, expected[1])


def test_the_candidates_hold_the_largest_and_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the builtin dictionary the bound leaves about two candidates for each latent kept."""
    dictionary = load_dictionary("resid-mid")
    x = torch.randn(64, dictionary.d_in, generator=torch.Generator().manual_seed(0))
    assert dictionary.k is not None
    screen = Screen.of(dictionary.encoder, dictionary.latent_bias)
    rows, splits, columns = kernel._candidates(x, screen, dictionary.k)
    exact = (x @ dictionary.encoder.T + dictionary.latent_bias).topk(dictionary.k).indices
    for place, row in enumerate(rows.tolist()):
        candidates = set(columns[splits[place] : splits[place + 1]].tolist())
        assert set(exact[row].tolist()) <= candidates
        assert len(candidates) < 8 * dictionary.k
    assert len(rows) > 32


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = whole_problem(n=100)
    whole = screened_topk(x, weight, bias, Screen.of(weight, bias), K)
    monkeypatch.setattr(kernel, "TILE_ELEMENTS", 16 * N_LATENTS)
    tiled = screened_topk(x, weight, bias, Screen.of(weight, bias), K)
    assert torch.equal(whole[0], tiled[0])
    assert torch.equal(whole[1], tiled[1])


def test_what_can_be_screened() -> None:
    x = torch.zeros(64, D)
    assert can_screen(x, N_LATENTS, K)
    assert not can_screen(x[:8], N_LATENTS, K)  # too few rows
    assert not can_screen(x.double(), N_LATENTS, K)
    assert not can_screen(x, 100, K)  # too few latents


def test_a_dictionary_encodes_the_same_with_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_runtime.dictionary.dictionary.screening_is_fast", lambda: True)  # whatever CPU this is
    plain: Dictionary = load_dictionary("resid-mid")
    screened = plain.with_fast_encoder()
    assert plain.screen is None
    assert screened.screen is not None
    x = 3 * torch.randn(200, plain.d_in, generator=torch.Generator().manual_seed(1))
    found, expected = screened.encode(x), plain.encode(x)
    torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=1e-5)
    assert (found.indices == expected.indices).float().mean() > 0.999  # values that tie to 1e-6 may change places
    assert screened.to(dtype=torch.float64).screen is None
    assert load_dictionary("resid-mid", dtype=torch.bfloat16).with_fast_encoder().screen is None
