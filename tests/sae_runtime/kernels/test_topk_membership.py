"""Against a dense product and torch.topk."""

from typing import Any

import numpy as np
import pytest
import torch

from sae_runtime.edits.latent_reader import LatentReader
from sae_runtime.kernels import topk_membership
from sae_runtime.kernels.byte_encoder import ByteEncoder, PackedRows
from sae_runtime.kernels.products import Linear, few_rows_linear
from sae_runtime.kernels.topk_membership import kept_in_topk
from tests.sae_runtime.kernels.test_byte_encoder import NEEDS_TILES
from tests.service.engine.models import random_dictionary


@pytest.mark.parametrize(
    "how",
    ["whole", "tiles", "tiles of many near"]
    + [pytest.param(how, marks=NEEDS_TILES) for how in ("bytes", "bytes in parts", "bytes of many near")],
)
@pytest.mark.parametrize(("n_latents", "k"), [(50, 7), (5000, 32), (3000, 2999), (1500, 1)])
def test_equals_a_dense_topk(monkeypatch: pytest.MonkeyPatch, n_latents: int, k: int, how: str) -> None:
    monkeypatch.setattr(topk_membership, "SMALL_LATENTS", 10_000 if "whole" in how else 0)
    if "parts" in how:
        monkeypatch.setattr(topk_membership, "_MOST_HELD", 40 * n_latents)  # 40 pairs at once
    if "near" in how:
        monkeypatch.setattr(topk_membership, "MOST_NEAR", 1)
    generator = torch.Generator().manual_seed(n_latents)
    # Whole numbers: sums are exact in any order, and many values are equal.
    x, weight, bias = (
        torch.randint(-3, 4, s, generator=generator).float() for s in ((6, 9), (n_latents, 9), (n_latents,))
    )
    dense = x @ weight.T + bias
    order = dense.argsort(dim=1, descending=True, stable=True)  # of equals the lower latent first
    rank = order.argsort(dim=1)
    rows = torch.randint(0, 6, (200,), generator=generator).sort().values
    latents = torch.randint(0, n_latents, (200,), generator=generator)
    some = torch.randperm(200, generator=generator)
    edge, beyond = some[:40], some[40:50]
    latents[edge] = order[rows[edge], torch.randint(0, k, (40,), generator=generator)]  # kept ones, some at the edge
    latents[beyond] = order[rows[beyond], min(k, n_latents - 1)]
    positive = dense[rows, latents] > 0
    rows, latents = rows[positive], latents[positive]
    in_bytes = ByteEncoder.of(weight, bias) if "bytes" in how else None
    values = dense[rows, latents].numpy()
    found = kept_in_topk(x[rows], Linear(weight.T, bias), k, latents.numpy(), values, in_bytes)
    assert found.tolist() == (rank[rows, latents] < k).tolist()
    assert found.any()
    assert k >= n_latents // 2 or not found.all()


@pytest.mark.parametrize("as_bytes", [pytest.param(True, marks=NEEDS_TILES), False])
def test_any_pairs_of_a_few_rows(as_bytes: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        x, weight = torch.randn(3, 5, generator=generator), torch.randn(20, 5, generator=generator)
        dense = x @ weight.T
        rank = dense.argsort(dim=1, descending=True).argsort(dim=1)
        rows = torch.randint(0, 3, (4,), generator=generator).sort().values
        latents = torch.randint(0, 20, (4,), generator=generator)
        rows, latents = rows[positive := dense[rows, latents] > 0], latents[positive]
        if not len(rows):
            continue
        in_bytes = ByteEncoder.of(weight, torch.zeros(20)) if as_bytes else None
        values = dense[rows, latents].numpy()
        found = kept_in_topk(x[rows], Linear(weight.T, torch.zeros(20)), 4, latents.numpy(), values, in_bytes)
        assert found.tolist() == (rank[rows, latents] < 4).tolist()


@NEEDS_TILES
def test_bytes_decide_as_float32_does() -> None:
    """Values so near to each other that bytes cannot tell many of them apart."""
    generator = torch.Generator().manual_seed(8)
    x, weight = torch.randn(20, 48, generator=generator), torch.randn(6000, 48, generator=generator)
    bias = 0.1 * torch.randn(6000, generator=generator)
    dense = x @ weight.T + bias
    order = dense.argsort(dim=1, descending=True)
    rows = torch.arange(20).repeat_interleave(12)
    latents = order[:, 26:38].reshape(-1)  # ranks around the 32nd
    values = dense[rows, latents].numpy()
    found = kept_in_topk(x[rows], Linear(weight.T, bias), 32, latents.numpy(), values, ByteEncoder.of(weight, bias))
    assert found.reshape(20, 12).tolist() == [[True] * 6 + [False] * 6] * 20


@NEEDS_TILES
def test_rows_are_left_out_as_they_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """70 of 100 rows are known after the first tile: groups of 16 rows are left out, and lanes keep their rows."""
    reads: list[tuple[int, int, int]] = []
    count = ByteEncoder.count

    def counted(self: ByteEncoder, packed: PackedRows, start: int, end: int, *others: Any) -> int:
        reads.append((len(packed.digits), start, end))
        return count(self, packed, start, end, *others)

    monkeypatch.setattr(ByteEncoder, "count", counted)
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(100, 32, generator=generator), torch.randn(9000, 32, generator=generator)
    bias, dense = torch.zeros(9000), x @ weight.T
    order = dense.argsort(dim=1, descending=True)
    latents = order[:, 20].clone()
    latents[::10], latents[1::10], latents[2::10] = order[::10, 5], order[1::10, 31], order[2::10, 33]
    dropped = torch.arange(100) % 10 > 2
    latents[dropped] = order[dropped, 2000]
    values = dense[torch.arange(100), latents].numpy()
    found = kept_in_topk(x, Linear(weight.T, bias), 32, latents.numpy(), values, ByteEncoder.of(weight, bias))
    assert found.tolist() == [i % 10 in (0, 1) for i in range(100)]
    assert reads == [(7, 0, 1024), (2, 1024, 8192), (2, 8192, 9000)]


def test_looks_at_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        seen.append((len(x), len(weight)))
        return few_rows_linear(x, weight, bias)

    monkeypatch.setattr(topk_membership, "few_rows_linear", counted)
    monkeypatch.setattr(topk_membership, "SMALL_LATENTS", 0)
    weight = torch.ones(20_000, 2)
    weight[:10, 0] += torch.arange(10, 0, -1)
    x, bias = torch.ones(2, 2), torch.zeros(20_000)
    latents = np.array([19_000, 0])  # one of the smallest values, and the largest
    found = kept_in_topk(x, Linear(weight.T, bias), 4, latents, np.array([2, 12], np.float32))
    assert found.tolist() == [False, True]
    assert seen[0] == (2, 1024)
    assert {rows for rows, _ in seen[1:]} == {1}
    assert sum(n for _, n in seen) == 20_000


def test_edits_read_the_same_values_as_encoding_in_full() -> None:
    dictionary = random_dictionary("0.resid_post_mlp", 32, k=8, normalize=True, seed=3, n_latents=3000)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    dense = dictionary.encode_dense(x)
    features = torch.cat([dense.sum(0).topk(60).indices, torch.arange(2000, 2100)]).unique()
    wanted = torch.rand(40, len(features), generator=torch.Generator().manual_seed(2)) < 0.3
    found, statistics = LatentReader(dictionary, features, wanted).read(x)
    torch.testing.assert_close(found * wanted, dense[:, features] * wanted)
    assert (found * wanted).count_nonzero() > 20
    assert statistics is not None
