"""Sparse rows as rows and as a dense array."""

from __future__ import annotations

import numpy as np
import pytest

from service.client import SparseRows


def test_sparse_rows():
    rows = SparseRows(
        np.array([0, 2, 2, 3], np.uint32), np.array([4, 0, 1], np.uint32), np.array([3.0, 1.0, 2.0], np.float32)
    )
    assert len(rows) == 3
    np.testing.assert_array_equal(rows.to_dense(5), [[1, 0, 0, 0, 3], [0, 0, 0, 0, 0], [0, 2, 0, 0, 0]])
    assert [(list(i), list(v)) for i, v in rows] == [([4, 0], [3, 1]), ([], []), ([1], [2])]
    with pytest.raises(IndexError):
        rows.row(3)
