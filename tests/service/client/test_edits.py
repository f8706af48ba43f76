"""Edits are what the functions that make them say."""

from __future__ import annotations

import pytest

from service.client import (
    Edit,
    ablate_feature,
    add_to_feature,
    clamp_feature,
    scale_feature,
    set_feature,
)
from service.edits.messages import edit_message
from service.pb.saeserve.v1 import edits_pb2


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
def test_edits(edit: Edit, expected: edits_pb2.Edit):
    assert edit_message(edit) == expected


def test_clamp_needs_a_bound():
    with pytest.raises(ValueError, match="minimum, maximum or both"):
        clamp_feature("d", 1)
