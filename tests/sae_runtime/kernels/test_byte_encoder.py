"""Counts of what is above a value, against float64: never more is sure than is so, and nothing is left out."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.kernels import byte_encoder
from sae_runtime.kernels.byte_encoder import BLOCK, LANES, ByteEncoder, Tally, bytes_are_fast

NEEDS_TILES = pytest.mark.skipif(not bytes_are_fast(), reason="this CPU has no matrix tiles")


def count(
    encoder: ByteEncoder, x: Tensor, values: Tensor, latents: Tensor, end: int, room: int = 100_000
) -> tuple[NDArray[np.int64], Tensor]:
    """How many are surely above, and the near ones as bools [n, end]; nothing is ever done for k being large."""
    n = len(x)
    tally = Tally.of(n, room)
    packed = encoder.pack(x.numpy(), np.arange(n), values.numpy())
    encoder.count(packed, 0, end, 1 << 40, latents.numpy(), tally)
    n_pairs = tally.n_near.sum()
    is_near = np.zeros((n, end), np.bool_)
    is_near[tally.near[:n_pairs, 0], tally.near[:n_pairs, 1]] = True
    assert is_near.sum() == min(n_pairs, room)
    return tally.n_above, torch.from_numpy(is_near)


@NEEDS_TILES
@pytest.mark.parametrize("kind", ["normal", "outliers", "small", "large", "constant", "biased"])
@pytest.mark.parametrize(("n", "n_inputs", "n_latents"), [(1, 64, 32), (16, 256, 4096), (37, 100, 1000), (3, 7, 33)])
def test_bounds_hold(kind: str, n: int, n_inputs: int, n_latents: int) -> None:
    generator = torch.Generator().manual_seed(n_latents)
    x, weight = torch.randn(n, n_inputs, generator=generator), torch.randn(n_latents, n_inputs, generator=generator)
    bias = torch.randn(n_latents, generator=generator)
    if kind == "outliers":  # of inputs, as in GPT-2's residual stream, and of weights
        x[:, 3] *= 500
        weight[::5, 2] *= 100
    elif kind in ("small", "large"):
        x *= {"small": 1e-6, "large": 1e6}[kind]
        bias *= {"small": 1e-6, "large": 1e6}[kind]
        weight[::3] *= 1e-3
    elif kind == "constant":
        x[:], weight[::2] = 1, 0.1
    elif kind == "biased":
        bias *= 1e4
    exact = x.double() @ weight.double().T + bias.double()
    latents = exact.argsort(dim=1, descending=True)[torch.arange(n), torch.arange(n) % n_latents]
    values = (x @ weight.T + bias)[torch.arange(n), latents]
    encoder = ByteEncoder.of(weight, bias)
    n_above, near = count(encoder, x, values, latents, n_latents)
    larger = exact > exact[torch.arange(n), latents][:, None]
    equal = exact == exact[torch.arange(n), latents][:, None]
    others = torch.arange(n_latents) != latents[:, None]
    assert not near[~others].any()
    assert (near | ~equal | ~others).all()
    assert (n_above + (larger & near).sum(1).numpy() == larger.sum(1).numpy()).all()  # all that are not near are known
    if kind == "normal" and n_latents == 4096:
        assert near.sum() < 0.02 * near.numel()  # and these are most


@NEEDS_TILES
def test_threads_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 96, generator=generator), torch.randn(5000, 96, generator=generator)
    bias, latents = torch.zeros(5000), torch.arange(50)
    values, encoder = (x @ weight.T).topk(40).values[:, -1], ByteEncoder.of(weight, bias)
    found = {}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for most in (0, 1 << 40):
            monkeypatch.setattr(byte_encoder, "PARALLEL_BYTES", most)
            found[most] = count(encoder, x, values, latents, 5000)
    finally:
        torch.set_num_threads(before)
    (above, near), (above_of_one, near_of_one) = found.values()
    assert above.tolist() == above_of_one.tolist()
    assert near.equal(near_of_one)
    assert above.sum() > 500
    assert near.any()


@NEEDS_TILES
def test_torch_says_where_its_threads_are() -> None:
    from sae_runtime.kernels import amx

    assert amx._on_threads() is not None


@NEEDS_TILES
def test_a_full_list_is_told() -> None:
    weight = torch.ones(64, 5)
    x, latents = torch.ones(2, 5), torch.tensor([3, 40])
    n_above, near = count(ByteEncoder.of(weight, torch.zeros(64)), x, torch.full((2,), 5.0), latents, 64, room=10)
    assert n_above.tolist() == [0, 0]
    assert near.sum() == 10


@NEEDS_TILES
def test_rows_that_are_done_are_not_read_on() -> None:
    weight = torch.ones(64 * BLOCK, 5)
    x, latents = torch.ones(1, 5), np.zeros(1, np.int64)
    tally = Tally.of(1, 1)
    encoder = ByteEncoder.of(weight, torch.zeros(64 * BLOCK))
    packed = encoder.pack(x.numpy(), np.arange(1), np.ones(1, np.float32))
    encoder.count(packed, 0, 64 * BLOCK, 7, latents, tally)
    assert tally.n_above.tolist() == [7]


@NEEDS_TILES
@pytest.mark.parametrize("size", [0.0, 1e-42, 3e38])
def test_rows_without_a_useful_scale(size: float) -> None:
    """Zeros are exact; where numbers underflow or overflow nothing is sure but what is so."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(100, 9, generator=generator), torch.randn(100, generator=generator)
    weight[50] = 0
    x = torch.full((LANES + 1, 9), size)
    exact = x.double() @ weight.double().T + bias.double()
    latents = torch.full((LANES + 1,), 50)
    n_above, near = count(ByteEncoder.of(weight, bias), x, bias[latents], latents, 100)
    larger = exact > exact[:, 50:51]
    assert (n_above + (larger & near).sum(1).numpy() == larger.sum(1).numpy()).all()


@NEEDS_TILES
def test_torch_finds_its_tiles_as_it_needs_them() -> None:
    """It multiplies in bfloat16 on the same ones, laid out otherwise."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 300, generator=generator).bfloat16() for _ in range(2))
    expected, (x, weight) = a @ b, (torch.randn(n, 80, generator=generator) for n in (20, 20_000))
    encoder, latents = ByteEncoder.of(weight, torch.zeros(20_000)), torch.arange(20)
    for _ in range(5):
        n_above, near = count(encoder, x, (x * weight[:20]).sum(1), latents, 20_000)
        assert (a @ b).equal(expected)
    assert n_above.any()
    assert near.any()


def test_sums_that_int32_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has 70000 inputs, expected up to 66304"):
        ByteEncoder.of(torch.zeros(1, 70_000), torch.zeros(1))


@NEEDS_TILES
def test_the_largest_sums() -> None:
    n_inputs = byte_encoder.MOST_INPUTS
    weight = torch.ones(2, n_inputs) * torch.tensor([[1.0], [-1.0]])
    x, latents = torch.ones(1, n_inputs), torch.tensor([0])
    n_above, near = count(ByteEncoder.of(weight, torch.zeros(2)), x, torch.full((1,), 1.0), latents, 2)
    assert n_above.tolist() == [0]
    assert not near.any()
    n_above, near = count(ByteEncoder.of(weight, torch.zeros(2)), -x, torch.full((1,), 1.0), latents, 2)
    assert n_above.tolist() == [1]
