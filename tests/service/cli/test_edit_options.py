"""Edits on the command line: files, presets, reference texts, positions and conditions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_runtime.edits import AfterText, Edit, Reference
from service.cli.edit_options import describe
from service.client import edits
from service.edits.messages import edit_message
from service.pb.saeserve.v1 import edits_pb2
from tests.service.cli.conftest import Output
from tests.service.client.fake_server import FakeServer

Call = Callable[..., Output]

SETS = """
- {name: one, edits: [{feature: "resid-mid:3", set: 2, unit: max, positions: last}]}
- {name: two, edits: [{feature: "resid-mid:4", ablate: zero}, {dictionary: resid-late, replace: true}]}
"""


def sent(fake: FakeServer) -> list[edits_pb2.Edit]:
    return list(fake.requests("Generate")[-1].edits)


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    file = tmp_path / "edits.yaml"
    file.write_text(SETS)
    return file


def test_edits_of_a_file_stand_where_they_are_named(call: Call, fake: FakeServer, sets: Path):
    code, _, err = call(
        "generate", "Once", "--scale", "resid-mid:1=2", "--edits", f"{sets}:two", "--add", "resid-mid:9=1"
    )
    assert code == 0, err
    assert sent(fake) == [
        edit_message(Edit("resid-mid", 1, "scale", 2.0)),
        edit_message(Edit("resid-mid", 4, "ablate_zero")),
        edit_message(Edit("resid-late", 0, "replace")),
        edit_message(Edit("resid-mid", 9, "add", 1.0)),
    ]


def test_files_that_cannot_be_used(call: Call, sets: Path, tmp_path: Path):
    plain = tmp_path / "plain.yaml"
    plain.write_text("[{feature: 'resid-mid:1', set: 1, strength: 3}]")
    for argument, message in (
        (f"{sets}", "has several sets of edits (one, two); write FILE:NAME"),
        (f"{sets}:three", "has no set 'three'; its sets: one, two"),
        (f"{plain}", "[0].strength: no such key"),
        (f"{tmp_path / 'none.yaml'}", "cannot read edits from"),
    ):
        code, _, err = call("generate", "Once", "--edits", argument)
        assert code == 2
        assert message in " ".join(err.split())


def test_reference_texts_replacements_positions_and_conditions(call: Call, fake: FakeServer):
    where = "2 > 0.5 and (resid-late:3 <= 0 or 4 > 1 max)"
    options = ("--positions", "after:Once upon", "--reference-tokens", "mean", "--where", where)
    code, _, err = call("generate", "Once", "--resample", "resid-mid:5=A = B", "--replace", "resid-mid", *options)
    assert code == 0, err
    first, second = sent(fake)
    assert first.resample.reference.text == "A = B"
    assert first.resample.tokens == edits_pb2.REFERENCE_TOKENS_MEAN
    assert second.WhichOneof("operation") == "replace"
    for edit in (first, second):
        assert edit.positions == edit_message(Edit("d", 0, "replace", positions=AfterText("Once upon"))).positions
        assert len(edit.condition.all_of.conditions) == 2
        assert edit.condition.all_of.conditions[1].any_of.conditions[0].dictionary == "resid-late"
    assert " ".join(err.split()).startswith(
        "resid-mid:5 as on 'A = B' (mean), resid-mid's reconstruction on tokens after 'Once upon' where "
        "2 > 0.5 and (resid-late:3 <= 0 or 4 > 1 max)"
    )
    call("generate", "Once", "--resample", "resid-mid:5=A", "--positions", "last")
    assert sent(fake) == [edit_message(Edit("resid-mid", 5, "resample", positions="last", reference=Reference("A")))]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--where", "2 >"),
        ("--where", "2 < 3"),
        ("--positions", "after:"),
        ("--positions", "first"),
        ("--resample", "5"),
        ("--resample", "5="),
        ("--reference-tokens", "first"),
    ],
)
def test_wrong_usage(call: Call, arguments: tuple[str, ...]):
    code, out, err = call("generate", "Once", *arguments)
    assert (code, out) == (2, "")
    assert arguments[0] in err


def test_presets_of_the_server(call: Call, fake: FakeServer):
    preset = edits_pb2.EditPreset(name="calm", edits=[edit_message(Edit("resid-mid", 4, "ablate_zero"))])
    fake.edit_presets.append(preset)
    code, _, err = call("generate", "Once", "--preset", "calm", "--add", "resid-mid:9=1")
    assert code == 0, err
    request = fake.requests("Generate")[-1]
    assert list(request.presets) == ["calm"]
    assert list(request.edits) == [edit_message(Edit("resid-mid", 9, "add", 1.0))]
    assert err.startswith("resid-mid:4 ablated, resid-mid:9 + 1")
    code, _, err = call("generate", "Once", "--preset", "wild")
    assert (code, err) == (2, "saeserve: no preset 'wild'; the server has: calm\n")
    assert "calm" in call("info").out


def test_describe():
    assert describe([]) == "no edits"
    place: dict[str, Any] = {"positions": "prompt", "where": (4, 0.5)}
    described = [edits.add_to_feature("d", 1, -2, **place), edits.ablate_feature("d", 2, "mean", **place)]
    assert describe(described) == "d:1 - 2, d:2 = its mean on prompt tokens where 4 > 0.5"
    described[1] = edits.resample_feature(
        "d", 2, "A text", positions=edits.AfterText("é", "each", 2), where="1 <= 0 or 2 > 1"
    )
    assert describe(described) == (
        "d:1 - 2 on prompt tokens where 4 > 0.5, "
        "d:2 as on 'A text' (last) on 2 tokens after each 'é' where 1 <= 0 or 2 > 1"
    )
    assert describe([edits.replace_by_reconstruction("d", positions="last")]) == (
        "d's reconstruction on the prompt's last token"
    )
    assert describe([edits.clamp_feature("d", 1, minimum=0, positions=[3])]) == "d:1 in [0, ∞] on token 3"
    assert describe([edits.set_feature("d", 1, 2.0, positions=[0, 4])]) == "d:1 = 2 on tokens 0, 4"
