"""Selection and aggregation of a mixed batch against plain loops over dense rows."""

import numpy as np
import pytest
import torch

from sae_runtime.dictionary.features import SparseFeatures
from sae_runtime.dictionary.ranking import ranking_table
from sae_runtime.dictionary.statistics import LatentStatistics
from service.engine.selection import RowRange, join_rows, select
from service.engine.work import Csr, Selection

N_LATENTS, WIDTH = 40, 9

SELECTIONS = [
    Selection(),
    Selection("top_k", k=3),
    Selection("top_k", k=100),
    Selection("features", features=(0, 7, 39, 12)),
    Selection("threshold", threshold=0.7),
    Selection("top_k", k=3, rank_by="surprise"),
    Selection("top_k", k=3, rank_by="z_score"),
    Selection("threshold", threshold=0.2, rank_by="surprise"),
    Selection(rank_by="z_score"),
]


def statistics() -> LatentStatistics:
    generator = torch.Generator().manual_seed(9)
    rate = torch.rand(N_LATENTS, generator=generator) ** 3
    typical = 0.2 + torch.rand(N_LATENTS, generator=generator)
    return LatentStatistics(
        firing_rate=rate,
        mean=rate * typical,
        mean_square=rate * typical**2 * 1.2,
        max=2 * typical,
        quantiles=torch.zeros(N_LATENTS, 1),
        quantile_levels=torch.tensor([0.5]),
        n_tokens=100_000,
    )


STATISTICS = statistics()


def rank(selection: Selection, latent: int, value: float) -> float:
    scores = ranking_table(STATISTICS, selection.rank_by).scores(np.array([latent]), np.array([value], np.float32))
    return float(scores[0])


def random_features(n: int, seed: int, negative: bool = False) -> SparseFeatures:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, WIDTH, generator=generator) - (0.5 if negative else 0.0)
    values = values.sort(dim=1, descending=True).values
    indices = torch.stack([torch.randperm(N_LATENTS, generator=generator)[:WIDTH] for _ in range(n)])
    listed = torch.arange(WIDTH) < torch.randint(0, WIDTH + 1, (n, 1), generator=generator)
    return SparseFeatures(indices.masked_fill(~listed, -1), values * listed, N_LATENTS)


def expected_rows(features: SparseFeatures, wanted: RowRange) -> list[list[tuple[int, float]]]:
    rows = []
    for r in range(wanted.start, wanted.end):
        entries = [(int(i), float(v)) for i, v in zip(features.indices[r], features.values[r], strict=True) if i >= 0]
        entries.sort(key=lambda entry: -rank(wanted.selection, *entry))
        match wanted.selection.kind:
            case "top_k":
                entries = entries[: wanted.selection.k]
            case "features":
                entries = [(i, v) for i, v in entries if i in wanted.selection.features]
            case "threshold":
                entries = [(i, v) for i, v in entries if v > wanted.selection.threshold]
        rows.append(entries)
    if wanted.combine == "none":
        return rows
    dense = np.zeros((len(rows), N_LATENTS))
    for r, entries in enumerate(rows):
        for i, v in entries:
            dense[r, i] = v
    combined = {"max": dense.max(0), "mean": dense.mean(0), "sum": dense.sum(0)}[wanted.combine]
    order = sorted(np.flatnonzero(combined), key=lambda i: (-rank(wanted.selection, i, combined[i]), i))
    return [[(int(i), float(combined[i])) for i in order]]


def assert_rows(found: Csr, expected: list[list[tuple[int, float]]]) -> None:
    assert (found.row_splits.dtype, found.indices.dtype, found.values.dtype) == (np.uint32, np.uint32, np.float32)
    assert found.row_splits.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert found.indices.tolist() == [i for row in expected for i, _ in row]
    assert found.values.tolist() == pytest.approx([v for row in expected for _, v in row], rel=1e-6)


@pytest.mark.parametrize("negative", [False, True])
def test_a_mixed_batch(negative: bool) -> None:
    ranges, n = [], 0
    for i, selection in enumerate(SELECTIONS):
        for j, combine in enumerate(("none", "max", "mean", "sum")):
            length = 1 + (3 * i + 5 * j) % 7
            ranges.append(RowRange(n, n + length, selection, combine))  # type: ignore[arg-type]
            n += length
    features = random_features(n, seed=1, negative=negative)
    for found, wanted in zip(select(features, ranges, STATISTICS), ranges, strict=True):
        assert_rows(found, expected_rows(features, wanted))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("combine", ["none", "max", "mean", "sum"])
def test_every_selection_alone(selection: Selection, combine: str) -> None:
    features = random_features(12, seed=2)
    wanted = RowRange(3, 11, selection, combine)  # type: ignore[arg-type]
    (found,) = select(features, [wanted], STATISTICS)
    assert_rows(found, expected_rows(features, wanted))


@pytest.mark.parametrize("combine", ["none", "max"])
def test_rows_without_any_feature(combine: str) -> None:
    silent = SparseFeatures(torch.full((4, WIDTH), -1), torch.zeros(4, WIDTH), N_LATENTS)
    (found,) = select(silent, [RowRange(0, 4, Selection(), combine)], None)  # type: ignore[arg-type]
    assert found.row_splits.tolist() == ([0] * 5 if combine == "none" else [0, 0])
    assert len(found.indices) == len(found.values) == 0


def test_no_columns_at_all() -> None:
    """A ReLU dictionary of which nothing fires."""
    nothing = SparseFeatures(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0), N_LATENTS)
    for selection in SELECTIONS:
        (found,) = select(nothing, [RowRange(0, 3, selection)], STATISTICS)
        assert found.row_splits.tolist() == [0, 0, 0, 0]


def test_rows_of_a_csr_join_and_part() -> None:
    features = random_features(10, seed=5)
    (whole,) = select(features, [RowRange(0, 10, Selection())], None)
    parts = [whole[0:4], whole[4:5], whole[5:10]]
    joined = join_rows(parts)
    assert len(whole) == 10
    for name in ("row_splits", "indices", "values"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert joined.row_splits.dtype == np.uint32


def test_another_order_than_by_activation_needs_statistics() -> None:
    features = random_features(2, seed=5)
    with pytest.raises(ValueError, match="needs statistics"):
        select(features, [RowRange(0, 2, Selection(rank_by="surprise"))], None)
