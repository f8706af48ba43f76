"""Requests are built and replies are read as the .proto files say."""

import numpy as np
import pytest

from service.client import (
    SparseRows,
    ablate_feature,
    add_to_feature,
    clamp_feature,
    edits,
    messages,
    scale_feature,
    set_feature,
)
from service.client.options import ExtractOptions, Inputs
from service.pb.saeserve.v1 import common_pb2, edits_pb2


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


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            set_feature("d", 7, 2.5, unit="max", positions="prompt"),
            edits_pb2.Edit(
                dictionary="d",
                feature=7,
                set=edits_pb2.Amount(value=2.5, unit=edits_pb2.UNIT_RECORDED_MAXIMUM),
                positions=edits_pb2.Positions(range=edits_pb2.POSITION_RANGE_PROMPT),
            ),
        ),
        (
            add_to_feature("d", 7, -1.0, positions=[0, 3]),
            edits_pb2.Edit(
                dictionary="d",
                feature=7,
                add=edits_pb2.Amount(value=-1.0, unit=edits_pb2.UNIT_RAW),
                positions=edits_pb2.Positions(explicit=edits_pb2.ExplicitPositions(positions=[0, 3])),
            ),
        ),
        (
            scale_feature("d", 7, 0.0, positions="generated"),
            edits_pb2.Edit(
                dictionary="d",
                feature=7,
                scale=0.0,
                positions=edits_pb2.Positions(range=edits_pb2.POSITION_RANGE_GENERATED),
            ),
        ),
        (
            clamp_feature("d", 7, maximum=3.0, where=(9, 0.5)),
            edits_pb2.Edit(
                dictionary="d",
                feature=7,
                clamp=edits_pb2.Clamp(maximum=3.0, unit=edits_pb2.UNIT_RAW),
                positions=edits_pb2.Positions(range=edits_pb2.POSITION_RANGE_ALL),
                condition=edits_pb2.Condition(feature=9, threshold=0.5),
            ),
        ),
        (
            ablate_feature("d", 7),
            edits_pb2.Edit(
                dictionary="d",
                feature=7,
                ablate=edits_pb2.ABLATION_ZERO,
                positions=edits_pb2.Positions(range=edits_pb2.POSITION_RANGE_ALL),
            ),
        ),
        (
            ablate_feature("d", 7, "mean"),
            edits_pb2.Edit(
                dictionary="d",
                feature=7,
                ablate=edits_pb2.ABLATION_MEAN,
                positions=edits_pb2.Positions(range=edits_pb2.POSITION_RANGE_ALL),
            ),
        ),
    ],
)
def test_edits(edit: edits.Edit, expected: edits_pb2.Edit):
    assert messages.edit_message(edit) == expected


def test_clamp_needs_a_bound():
    with pytest.raises(ValueError, match="minimum, maximum or both"):
        clamp_feature("d", 1)


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


def test_sparse_rows():
    rows = SparseRows(
        np.array([0, 2, 2, 3], np.uint32), np.array([4, 0, 1], np.uint32), np.array([3.0, 1.0, 2.0], np.float32)
    )
    assert len(rows) == 3
    np.testing.assert_array_equal(rows.to_dense(5), [[1, 0, 0, 0, 3], [0, 0, 0, 0, 0], [0, 2, 0, 0, 0]])
    assert [(list(i), list(v)) for i, v in rows] == [([4, 0], [3, 1]), ([], []), ([1], [2])]
    with pytest.raises(IndexError):
        rows.row(3)
