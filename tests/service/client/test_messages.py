"""Requests are built as the .proto files say."""

from __future__ import annotations

import numpy as np
import pytest

from service.client import InputStatistics, SparseRows, messages
from service.client.options import ExtractOptions, Inputs
from service.pb.saeserve.v1 import common_pb2
from tests.service.client.both_clients import Run, value
from tests.service.client.fake_server import FakeServer


def texts_and_ids(inputs: Inputs) -> list[object]:
    request = messages.extract_features_request(inputs, ["d"])
    return [i.text if i.WhichOneof("input") == "text" else list(i.token_ids.ids) for i in request.inputs]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("one text", ["one text"]),
        ("", [""]),
        (["two", "texts"], ["two", "texts"]),
        ([1, 2, 3], [[1, 2, 3]]),
        (np.array([1, 2, 3]), [[1, 2, 3]]),
        ([np.int64(7)], [[7]]),
        ([[1, 2], "text", np.array([3])], [[1, 2], "text", [3]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([], []),
    ],
)
def test_inputs(inputs: Inputs, expected: list[object]):
    assert texts_and_ids(inputs) == expected


def test_bytes_are_no_input():
    with pytest.raises(TypeError, match="expected str or token ids"):
        messages.extract_features_request([b"text"], ["d"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"top_k": 3}, "top_k: 3\n"),
        ({"features": [4, 1]}, "features {\n  ids: 4\n  ids: 1\n}\n"),
        ({"features": []}, "features {\n}\n"),
        ({"threshold": 0.0}, "threshold: 0\n"),
    ],
)
def test_selections(options: ExtractOptions, expected: str | None):
    request = messages.extract_features_request("x", ["d"], **options)
    assert (str(request.selection) if request.HasField("selection") else None) == expected


def test_two_selections_exclude_each_other():
    with pytest.raises(ValueError, match="top_k and threshold exclude each other"):
        messages.extract_features_request("x", ["d"], top_k=3, threshold=0.5)


def test_unknown_names_of_options():
    with pytest.raises(ValueError, match="aggregation is 'median', expected one of none, max, mean, sum, last"):
        messages.extract_features_request("x", ["d"], aggregation="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="overflow is 'cut'"):
        messages.generate_request("x", overflow="cut")  # type: ignore[arg-type]


def test_generate_options():
    request = messages.generate_request([5, 6], temperature=0.5, top_k=3, seed=0, stop="\n")
    assert list(request.prompt.token_ids.ids) == [5, 6]
    assert request.sampling.temperature == 0.5
    assert request.sampling.top_k == 3
    assert request.sampling.HasField("seed")
    assert list(request.stop) == ["\n"]
    plain = messages.generate_request("x")
    assert not plain.sampling.HasField("seed")
    assert not plain.HasField("features")
    with pytest.raises(ValueError, match="belong to features"):
        messages.generate_request("x", prompt_features=True)


def test_activations_travel_in_their_own_width():
    x = np.arange(6, dtype=np.float16).reshape(2, 3)
    tensor = messages.encode_activations_request("d", x).activations
    assert (tensor.dtype, list(tensor.shape)) == (common_pb2.DATA_TYPE_FLOAT16, [2, 3])
    np.testing.assert_array_equal(np.frombuffer(tensor.data, "<f2").reshape(2, 3), x)

    tensor = messages.encode_activations_request("d", x.astype(np.float64)[:, ::-1]).activations
    assert tensor.dtype == common_pb2.DATA_TYPE_FLOAT32
    np.testing.assert_array_equal(np.frombuffer(tensor.data, "<f4").reshape(2, 3), x[:, ::-1])

    tensor = messages.encode_activations_request("d", [[1.0, 2.0]]).activations
    assert tensor.data == np.array([1, 2], "<f4").tobytes()


def test_decode_without_statistics(run: Run, fake: FakeServer):
    rows = SparseRows(np.array([0, 1]), np.array([5]), np.array([1.5]))
    run(lambda client: value(client.decode_features("resid-mid", rows)))
    (sent,) = fake.requests("DecodeFeatures")
    assert not sent.HasField("input_statistics")
    assert (list(sent.features.indices), list(sent.features.values)) == ([5], [1.5])


def test_decode_of_no_rows_keeps_its_statistics(run: Run, fake: FakeServer):
    empty = np.zeros(0, np.float32)
    rows = SparseRows(np.array([0]), np.zeros(0, np.uint32), empty)
    run(lambda client: value(client.decode_features("resid-mid", rows, InputStatistics(empty, empty))))
    assert fake.requests("DecodeFeatures")[0].HasField("input_statistics")
