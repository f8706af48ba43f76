"""Every edit goes through its message unchanged."""

from dataclasses import replace

import pytest

from sae_runtime.edits import AfterText, AllOf, AnyOf, Condition, Edit, Reference
from service.edits.messages import edit_message, read_edit
from service.pb.saeserve.v1 import edits_pb2

NESTED = AnyOf((AllOf((Condition(1, 0.5), Condition(2, 0.25, "e", "at_most", "max"))), Condition(3)))
EDITS = [
    Edit("d", 1, "set", 2.5, unit="max"),
    Edit("d", 1, "add", -1.0, positions="last"),
    Edit("d", 1, "scale", 0.5, positions="generated"),
    Edit("d", 1, "clamp", minimum=0.0, positions=(0, 3)),
    Edit("d", 1, "clamp", maximum=2.0, unit="max", positions=AfterText("é")),
    Edit("d", 1, "ablate_zero", positions=AfterText("a b", "each", 4)),
    Edit("d", 1, "ablate_mean", condition=Condition(9, 0.5)),
    Edit("d", 1, "resample", reference=Reference("A text"), condition=NESTED),
    Edit("d", 1, "resample", reference=Reference((1, 2), "aligned"), positions="prompt"),
    Edit("d", 0, "replace", condition=AllOf((Condition(0, 1.0),))),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.operation)
def test_round_trip(edit: Edit) -> None:
    assert read_edit(edits_pb2.Edit.FromString(edit_message(edit).SerializeToString())) == edit


def test_what_messages_cannot_say() -> None:
    wrong = [
        (replace(EDITS[0], operation="double"), "operation is 'double'"),
        (replace(EDITS[0], positions="first"), "positions is 'first'"),
        (replace(EDITS[0], unit="percent"), "unit is 'percent'"),
        (replace(EDITS[0], value=0.0, values=(1.0,)), "a value for each position"),
        (replace(EDITS[7], reference=None), "needs a reference"),
    ]
    for edit, message in wrong:
        with pytest.raises(ValueError, match=message):
            edit_message(edit)
