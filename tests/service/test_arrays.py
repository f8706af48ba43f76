"""Messages written and read as wire bytes equal those filled field by field."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import arrays
from service.pb.saeserve.v1 import common_pb2, feature_service_pb2

uints = st.lists(st.integers(0, 2**32 - 1), max_size=300)
floats = st.lists(st.floats(width=32), max_size=300)


@given(uints, uints, floats)
def test_sparse_rows_both_ways(splits: list[int], indices: list[int], values: list[float]) -> None:
    by_fields = common_pb2.SparseRows(row_splits=splits, indices=indices, values=values)
    packed = arrays.pack_sparse_rows(
        np.array(splits, np.uint32), np.array(indices, np.uint32), np.array(values, np.float32)
    )
    assert packed.SerializeToString() == by_fields.SerializeToString()
    unpacked = arrays.unpack_sparse_rows(by_fields)
    np.testing.assert_array_equal(unpacked[0], np.array(splits, np.uint32))
    np.testing.assert_array_equal(unpacked[1], np.array(indices, np.uint32))
    np.testing.assert_array_equal(unpacked[2], np.array(values, np.float32))


def test_fields_of_a_newer_client_are_passed_over() -> None:
    known = common_pb2.SparseRows(row_splits=[0, 1], indices=[3], values=[0.5])
    unknown = b"\xa8\x06\x07" + b"\xb2\x06\x02hi" + b"\xbd\x06abcd" + b"\xc1\x06abcdefgh" + b"\xcb\x06\xcc\x06"
    unpacked = arrays.unpack_sparse_rows(
        common_pb2.SparseRows.FromString(unknown + known.SerializeToString() + unknown)
    )
    assert [array.tolist() for array in unpacked] == [[0, 1], [3], [0.5]]


@given(floats)
def test_input_statistics_both_ways(values: list[float]) -> None:
    array = np.array(values, np.float32)
    packed = arrays.pack_input_statistics(array, array[::-1])
    expected = common_pb2.InputStatistics(mean=values, std=values[::-1])
    assert packed.SerializeToString() == expected.SerializeToString()
    mean, std = arrays.unpack_input_statistics(expected)
    np.testing.assert_array_equal(mean, array)
    np.testing.assert_array_equal(std, array[::-1])


def test_dictionary_features() -> None:
    splits, indices, values = np.array([0, 2, 3]), np.array([5, 1, 2]), np.array([0.5, 0.25, 3.0])
    data = arrays.dictionary_features_bytes("wörter", splits, indices, values, np.array([0.1, 0.2]), "ab12")
    assert feature_service_pb2.DictionaryFeatures.FromString(data) == feature_service_pb2.DictionaryFeatures(
        dictionary="wörter",
        features=common_pb2.SparseRows(row_splits=[0, 2, 3], indices=[5, 1, 2], values=[0.5, 0.25, 3.0]),
        reconstruction_error=[0.1, 0.2],
        fingerprint="ab12",
    )


def test_tensor_both_ways() -> None:
    array = np.arange(24, dtype=np.float64).reshape(2, 3, 4)[:, ::2]
    message = arrays.pack_tensor(array)
    assert list(message.shape) == [2, 2, 4]
    np.testing.assert_array_equal(arrays.unpack_tensor(message), array)
    assert arrays.unpack_tensor(common_pb2.Tensor(shape=[0, 3])).shape == (0, 3)


@pytest.mark.parametrize(
    "message",
    [
        common_pb2.Tensor(shape=[2, 2], data=b"\0" * 15),
        common_pb2.Tensor(shape=[2**32 - 1] * 3, data=b""),
        common_pb2.Tensor(shape=[1], data=b"\0" * 4, dtype=99),
        common_pb2.Tensor(shape=[1], data=b"\0" * 4, dtype=common_pb2.DATA_TYPE_BFLOAT16),
    ],
)
def test_tensors_that_do_not_hold_together(message: common_pb2.Tensor) -> None:
    with pytest.raises(ValueError, match=r"data has|dtype"):
        arrays.unpack_tensor(message)
