"""Sparse features of requests: a violation names the entry that is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from service.pb.saeserve.v1 import common_pb2
from service.rpc.array_inputs import read_sparse_rows
from service.rpc.checks import Violations
from service.rpc.errors import RpcError
from service.rpc.limits import Limits
from tests.service.conftest import served_dictionaries

pytestmark = pytest.mark.any_cpu

LIMITS = Limits(max_activation_rows=3, max_selected_features=2)


@pytest.mark.parametrize(
    ("splits", "indices", "values", "message"),
    [
        ([0, 1, 2, 2, 2], [1, 2], [1, 1], "features.row_splits: is of 4 rows, more than max_activation_rows = 3"),
        (
            [0, 7],
            [0] * 7,
            [1] * 7,
            "features.indices: has 7 entries, more than max_activation_rows x",
        ),
        ([0, 2, 1, 2], [1, 2], [1, 1], "features.row_splits[2]: is 1, less than the entry before it"),
        ([0, 2, 3], [1, 2, 96], [1, 1, 1], "features.indices[2]: feature 96 is outside 0..95 of 'mid'"),
        ([0, 2, 3], [1, 2, 3], [1, np.inf, 1], "features.values[1]: is inf, expected a finite number"),
        ([0, 1, 3], [4, 4, 4], [1, 1, 1], "features.indices[2]: feature 4 occurs twice in row 1"),
    ],
)
def test_wrong_entries_are_named(splits: list[int], indices: list[int], values: list[float], message: str) -> None:
    rows = common_pb2.SparseRows(row_splits=splits, indices=indices, values=values)
    violations = Violations(LIMITS)
    read_sparse_rows(rows, served_dictionaries()["mid"], LIMITS, violations)
    with pytest.raises(RpcError) as raised:
        violations.raise_if_any()
    assert message in raised.value.message


def test_rows_in_any_order() -> None:
    rows = common_pb2.SparseRows(row_splits=[0, 2, 2, 3], indices=[9, 1, 9], values=[1, 2, 3])
    violations = Violations(LIMITS)
    csr = read_sparse_rows(rows, served_dictionaries()["mid"], LIMITS, violations)
    assert not violations
    np.testing.assert_array_equal(csr.row_splits, [0, 2, 2, 3])
    np.testing.assert_array_equal(csr.indices, [9, 1, 9])
    np.testing.assert_array_equal(csr.values, [1, 2, 3])
