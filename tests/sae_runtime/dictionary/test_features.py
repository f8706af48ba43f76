"""SparseFeatures: dense, CSR and row views of the same numbers."""

import numpy as np
import torch

from sae_runtime import InputStatistics, SparseFeatures


def example() -> SparseFeatures:
    return SparseFeatures(
        indices=torch.tensor([[4, 0, -1], [2, -1, -1], [-1, -1, -1]]),
        values=torch.tensor([[3.0, 1.0, 0.0], [2.5, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        n_latents=6,
        input_statistics=InputStatistics(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0], [5.0], [6.0]])),
    )


def test_dense_form_has_each_value_at_its_latent_and_padding_nowhere() -> None:
    expected = torch.zeros(3, 6)
    expected[0, 4], expected[0, 0], expected[1, 2] = 3.0, 1.0, 2.5
    assert torch.equal(example().to_dense(), expected)


def test_l0_counts_listed_latents() -> None:
    assert example().l0.tolist() == [2, 1, 0]


def test_select_reads_latents_in_the_order_asked_repeats_included() -> None:
    features = torch.tensor([2, 0, 5, 2])
    assert torch.equal(example().select(features), example().to_dense()[:, features])
    assert example().select(torch.tensor([], dtype=torch.int64)).shape == (3, 0)


def test_csr_rows() -> None:
    row_splits, indices, values = example().to_csr()
    assert (row_splits.dtype, indices.dtype, values.dtype) == (np.uint32, np.uint32, np.float32)
    assert row_splits.tolist() == [0, 2, 3, 3]
    assert indices.tolist() == [4, 0, 2]
    assert values.tolist() == [3.0, 1.0, 2.5]


def test_rows_are_taken_with_their_input_statistics() -> None:
    for rows in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True])):
        last_rows = example()[rows]
        assert len(last_rows) == 2
        assert torch.equal(last_rows.to_dense(), example().to_dense()[1:])
        assert last_rows.input_statistics is not None
        assert last_rows.input_statistics.std.squeeze(1).tolist() == [5.0, 6.0]
