"""The sparse path against dense autograd in float64-tight tolerances, and the fast selection against torch.topk."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.training.choose_latents import choose_latents, top_indices
from sae_runtime.training.sparse_gradients import (
    SelectedLatents,
    reference_autoencode,
    selected_pre_activations,
    sparse_decode,
)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder": (96, 12), "latent_bias": (96,), "decoder": (96, 12), "pre_bias": (12,)}
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def sparse(x: Tensor, w: dict[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
    centred = x - w["pre_bias"].detach()
    chosen, indices = choose_latents(centred, w["encoder"].detach(), w["latent_bias"].detach(), k)
    selection = SelectedLatents.equal_rows(indices, len(w["encoder"]))
    values = selected_pre_activations(
        chosen.reshape(-1), selection, centred, w["encoder"], w["latent_bias"], w["pre_bias"]
    )
    return sparse_decode(values.relu(), selection, w["decoder"]), indices


@pytest.mark.parametrize("n_latents", [96, 2**16 + 1])
def test_sums_by_latent_are_products_with_the_dense_matrix(n_latents: int) -> None:
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(n_latents)[:5] for _ in range(40)])
    weights, rows = torch.randn(40, 5), torch.randn(40, 7)
    dense = torch.zeros(40, n_latents).scatter_(1, indices, weights)
    selection = SelectedLatents.equal_rows(indices, n_latents)
    torch.testing.assert_close(selection.sum_by_latent(rows, weights.flatten()), dense.T @ rows)
    torch.testing.assert_close(selection.sum_values(weights.flatten()), dense.sum(0))
    torch.testing.assert_close(selection.sum_by_row(rows.new_ones(n_latents, 3), weights.flatten())[:, 0], dense.sum(1))


@pytest.mark.parametrize("n_latents", [96, 2**16 + 1])
def test_rows_of_unequal_length_and_their_parts(n_latents: int) -> None:
    generator = torch.Generator().manual_seed(0)
    used = torch.rand(30, n_latents, generator=generator) < 5 / n_latents
    used[[0, 7, 29]] = False  # rows without latents, the first and the last among them
    dense = torch.where(used, torch.randn(30, n_latents, generator=generator), 0)
    tokens, indices = used.nonzero(as_tuple=True)
    values, rows = dense[used], torch.randn(30, 7, generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), used.sum(1).cumsum(0)])
    selection = SelectedLatents(indices, offsets, n_latents)
    assert torch.equal(selection.rows, tokens)
    weight = torch.randn(n_latents, 7, generator=generator)
    torch.testing.assert_close(selection.sum_by_row(weight, values), dense @ weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(selection.sum_by_latent(rows, values), dense.T @ rows, rtol=1e-4, atol=1e-5)
    # Cut into the latents below and above a half of all.
    half = n_latents // 2
    below = (used[:, :half]).sum(1)
    starts = torch.stack([offsets[:-1], offsets[:-1] + below], 1).flatten()
    parts = selection.split(torch.cat([starts, offsets[-1:]]))
    both = parts.sum_by_row(weight, values).view(30, 2, 7)
    torch.testing.assert_close(both[:, 0], dense[:, :half] @ weight[:half], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[:, 1], dense[:, half:] @ weight[half:], rtol=1e-4, atol=1e-5)
    of_parts = torch.randn(60, 7, generator=generator)
    expected = dense * (torch.arange(n_latents) < half)
    expected = expected.T @ of_parts[0::2] + (dense - expected).T @ of_parts[1::2]
    torch.testing.assert_close(parts.sum_by_latent(of_parts, values), expected, rtol=1e-4, atol=1e-5)


def test_nothing_selected_is_zero() -> None:
    none = torch.empty(0, dtype=torch.int64)
    selection = SelectedLatents(none, torch.zeros(4, dtype=torch.int64), 5)
    values = torch.empty(0, requires_grad=True)
    decoded = sparse_decode(values, selection, torch.randn(5, 2, requires_grad=True))
    assert torch.equal(decoded, torch.zeros(3, 2))
    decoded.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(selection.sum_by_latent(torch.randn(3, 2), values.detach()), torch.zeros(5, 2))


def test_gradients_equal_the_dense_reference(weights: dict[str, Tensor]) -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    decoded, indices = sparse(x, weights, k=7)
    target = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    F.mse_loss(decoded + weights["pre_bias"], target).backward()  # type: ignore[no-untyped-call]

    wide = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
    chosen = torch.zeros(50, 96, dtype=torch.bool).scatter_(1, indices, True)
    expected = reference_autoencode(
        x.double(), wide["encoder"], wide["latent_bias"], wide["decoder"], wide["pre_bias"], chosen
    )
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-5, atol=1e-5)
    F.mse_loss(expected + wide["pre_bias"], target.double()).backward()  # type: ignore[no-untyped-call]
    for name, w in weights.items():
        assert w.grad is not None
        assert w.grad.abs().max() > 1e-3
        torch.testing.assert_close(w.grad.double(), wide[name].grad, rtol=1e-4, atol=1e-6)


def test_a_latent_that_relu_silences_gets_no_gradient(weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        weights["latent_bias"].fill_(-1e3)
    decoded, _ = sparse(torch.randn(10, 12), weights, k=3)
    decoded.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.count_nonzero(decoded) == 0
    assert all(w.grad is None or torch.count_nonzero(w.grad) == 0 for w in weights.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, -4.0])  # -4: rows with fewer than k positive values
def test_fast_selection_equals_topk(dtype: torch.dtype, shift: float) -> None:
    x = (torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) + shift).to(dtype)
    k = 8
    indices = top_indices(x, k)
    assert indices.shape == (64, k)
    assert all(len(set(row.tolist())) == k for row in indices)
    # What ReLU leaves of them is what counts; of equal values any may be chosen.
    found = x.gather(1, indices).relu().sort(dim=1).values
    assert torch.equal(found, torch.topk(x, k, dim=1).values.relu().sort(dim=1).values)


def test_fast_selection_breaks_ties_by_the_lower_index() -> None:
    x = torch.zeros(2, 256)
    x[0, [5, 200]] = 1.0
    assert top_indices(x, 4).tolist() == [[5, 200, 0, 1], [0, 1, 2, 3]]


def test_selection_works_where_groups_do_not_fit() -> None:
    x = torch.randn(5, 130, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_indices(x, 9).sort().values, torch.topk(x, 9).indices.sort().values)


def test_tiles_do_not_change_the_choice() -> None:
    """Whole numbers: every sum is exact, so that products of different shapes have the same bits."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-64, 65, shape, generator=generator).float() for shape in ((33, 12), (96, 12), (96,))
    )
    values, indices = choose_latents(x, weight, bias, 5)
    tiled_values, tiled_indices = choose_latents(x, weight, bias, 5, tile_elements=4 * 96)
    assert torch.equal(indices.sort(1).values, tiled_indices.sort(1).values)
    assert torch.equal(values.sort(1).values, tiled_values.sort(1).values)
