"""Converts arrays to protobuf messages and back, through the messages' wire bytes.

Filling a repeated field from Python costs about 0.1 us per entry. Writing the array's bytes as a packed field and
parsing it costs one copy. A packed repeated field in the protobuf encoding:

    tag `number << 3 | 2` | length as a varint | little-endian elements
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from service.pb.saeserve.v1 import common_pb2, feature_service_pb2

if TYPE_CHECKING:
    from sae_runtime.model.tokenization import TokenizedText

FloatArray = NDArray[np.float32]
UintArray = NDArray[np.uint32]

_LENGTH_DELIMITED = 2
_EMPTY_UINTS: UintArray = np.zeros(0, np.uint32)
_EMPTY_FLOATS: FloatArray = np.zeros(0, np.float32)


def length_delimited(number: int, *contents: bytes) -> bytes:
    """Wire bytes of one string, bytes, message or packed field; `number` below 16."""
    return b"".join((bytes((number << 3 | _LENGTH_DELIMITED,)), _varint(sum(map(len, contents))), *contents))


def varint_field(number: int, value: int) -> bytes:
    """Wire bytes of an unsigned integer field; `number` below 16."""
    return bytes((number << 3,)) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _little_endian(array: NDArray[Any], dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def sparse_rows_bytes(row_splits: NDArray[Any], indices: NDArray[Any], values: NDArray[Any]) -> bytes:
    """Wire bytes of a SparseRows message: row_splits [n + 1], indices [nnz], values [nnz]."""
    return b"".join(
        (
            length_delimited(1, _little_endian(row_splits, "<u4")),
            length_delimited(2, _little_endian(indices, "<u4")),
            length_delimited(3, _little_endian(values, "<f4")),
        )
    )


def pack_sparse_rows(row_splits: NDArray[Any], indices: NDArray[Any], values: NDArray[Any]) -> common_pb2.SparseRows:
    """A CSR matrix as a message: row_splits [n + 1] and indices [nnz] as uint32, values [nnz] as float32."""
    return common_pb2.SparseRows.FromString(sparse_rows_bytes(row_splits, indices, values))


def unpack_sparse_rows(rows: common_pb2.SparseRows) -> tuple[UintArray, UintArray, FloatArray]:
    """row_splits [n + 1], indices [nnz], values [nnz] of a message, not checked for consistency."""
    fields = _packed_fields(rows)
    return (
        _uints(fields.get(1, b"")),
        _uints(fields.get(2, b"")),
        _floats(fields.get(3, b"")),
    )


def pack_input_statistics(mean: NDArray[Any], std: NDArray[Any]) -> common_pb2.InputStatistics:
    """Mean [n] and standard deviation [n] of each row as a message."""
    return common_pb2.InputStatistics.FromString(
        length_delimited(1, _little_endian(mean, "<f4")) + length_delimited(2, _little_endian(std, "<f4"))
    )


def unpack_input_statistics(statistics: common_pb2.InputStatistics) -> tuple[FloatArray, FloatArray]:
    """mean [n] and std [n] of a message, not checked for consistency."""
    fields = _packed_fields(statistics)
    return _floats(fields.get(1, b"")), _floats(fields.get(2, b""))


def dictionary_features_bytes(
    name: str,
    row_splits: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    reconstruction_error: NDArray[Any] | None,
) -> bytes:
    """Wire bytes of a DictionaryFeatures message; `reconstruction_error` is [n tokens] or None."""
    fields = [length_delimited(1, name.encode()), length_delimited(2, sparse_rows_bytes(row_splits, indices, values))]
    if reconstruction_error is not None:
        fields.append(length_delimited(3, _little_endian(reconstruction_error, "<f4")))
    return b"".join(fields)


def unpack_reconstruction_error(features: feature_service_pb2.DictionaryFeatures) -> FloatArray:
    """reconstruction_error [n tokens]; empty if it was not requested."""
    return np.array(features.reconstruction_error, dtype=np.float32)


def pack_tensor(
    array: NDArray[Any], dtype: common_pb2.DataType.ValueType = common_pb2.DATA_TYPE_FLOAT32
) -> common_pb2.Tensor:
    """An array of any shape as a message, rounded to the nearest number of its type (half: to even).

    Numbers beyond the range of float16 become infinite.
    """
    if dtype == common_pb2.DATA_TYPE_BFLOAT16:
        bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
        data = _little_endian((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, "<u2")
    elif dtype == common_pb2.DATA_TYPE_FLOAT16:
        with np.errstate(over="ignore"):
            data = _little_endian(array, "<f2")
    else:
        data = _little_endian(array, "<f4")
    return common_pb2.Tensor(shape=array.shape, dtype=dtype, data=data)


def unpack_tensor(tensor: common_pb2.Tensor) -> FloatArray:
    """The array of a message as float32, in the message's shape.

    Raises:
        ValueError: the element type is unknown, or the data's length does not fit the shape.
    """
    if tensor.dtype in (common_pb2.DATA_TYPE_UNSPECIFIED, common_pb2.DATA_TYPE_FLOAT32):
        element = "<f4"
    elif tensor.dtype == common_pb2.DATA_TYPE_FLOAT16:
        element = "<f2"
    elif tensor.dtype == common_pb2.DATA_TYPE_BFLOAT16:
        element = "<u2"
    else:
        raise ValueError(f"dtype {tensor.dtype} is not a known DataType")
    shape = tuple(tensor.shape)
    size = np.dtype(element).itemsize
    expected = math.prod(shape) * size  # Python integers: no overflow whatever the shape says
    if len(tensor.data) != expected:
        raise ValueError(
            f"data has {len(tensor.data)} bytes, expected {expected} for shape {list(shape)} of {size}-byte elements"
        )
    raw = np.frombuffer(tensor.data, dtype=element)
    if tensor.dtype == common_pb2.DATA_TYPE_BFLOAT16:
        floats = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        floats = raw.astype(np.float32)
    return floats.reshape(shape)


def pack_tokens(tokens: TokenizedText, pieces: list[bytes]) -> common_pb2.Tokens:
    """The tokens of one input as a message; `pieces` are their bytes."""
    return common_pb2.Tokens(
        ids=tokens.ids,
        pieces=pieces,
        byte_starts=tokens.byte_starts.tolist(),
        byte_ends=tokens.byte_ends.tolist(),
        char_starts=tokens.char_starts.tolist(),
        char_ends=tokens.char_ends.tolist(),
    )


def _packed_fields(message: common_pb2.SparseRows | common_pb2.InputStatistics) -> dict[int, memoryview]:
    """The fields of a message that has only packed fields, by number."""
    # Otherwise fields added by a newer client would come along, in any wire type.
    message.DiscardUnknownFields()
    data = memoryview(message.SerializeToString())
    fields: dict[int, memoryview] = {}
    at = 0
    while at < len(data):
        number, kind = data[at] >> 3, data[at] & 7
        assert kind == _LENGTH_DELIMITED, f"field {number} has wire type {kind}"
        at += 1
        length = shift = 0
        while True:
            byte = data[at]
            at += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        fields[number] = data[at : at + length]
        at += length
    return fields


def _uints(data: bytes | memoryview) -> UintArray:
    return _native(np.frombuffer(data, dtype="<u4")) if len(data) else _EMPTY_UINTS


def _floats(data: bytes | memoryview) -> FloatArray:
    return _native(np.frombuffer(data, dtype="<f4")) if len(data) else _EMPTY_FLOATS


def _native(array: NDArray[Any]) -> NDArray[Any]:
    return array if sys.byteorder == "little" else array.astype(array.dtype.newbyteorder("="))
