"""Edits through the API: presets, reference texts, positions after a text, and errors that name the field."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2

from sae_runtime import Edit
from sae_runtime.edits import resolve_references
from service.edits.messages import edit_message, read_edit
from service.pb.saeserve.v1 import common_pb2, server_service_pb2
from service.pb.saeserve.v1 import edits_pb2 as pb
from service.pb.saeserve.v1 import intervention_service_pb2 as intervention_pb
from service.replica import ReplicaSettings
from tests.builders import edited_model
from tests.service.conftest import LIMITS, Served, serve
from tests.service.rpc.reading import Failure, failure

PRESETS = """
- name: strong
  description: Pins a feature.
  edits:
    - {feature: "mid:3", set: 2, unit: max}
    - {feature: "wide:5", add: 4, positions: generated}
- name: lasting
  edits: [{feature: "early:9", add: 3, positions: last}]
"""


async def run(
    served: Served, *, edits: list[pb.Edit] | None = None, text: str = "Once upon", **fields: Any
) -> list[int]:
    request = intervention_pb.GenerateRequest(
        prompt=common_pb2.TextInput(text=text),
        max_new_tokens=8,
        ignore_end_of_text=True,
        edits=edits or [],
        **fields,
    )
    return [token async for reply in served.interventions.Generate(request) for token in reply.chunk.token_ids]


async def refused(served: Served, *edits: pb.Edit, **fields: Any) -> Failure:
    return await failure(run(served, edits=list(edits), **fields))


@pytest.fixture
def presets_file(tmp_path: Path) -> Path:
    file = tmp_path / "edits.yaml"
    file.write_text(PRESETS)
    return file


async def test_presets_by_name_and_with_further_edits(presets_file: Path) -> None:
    async for served in serve(ReplicaSettings(limits=LIMITS, edit_presets=str(presets_file))):
        info = await served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
        assert [(preset.name, preset.description, len(preset.edits)) for preset in info.edit_presets] == [
            ("lasting", "", 1),
            ("strong", "Pins a feature.", 2),
        ]
        further = Edit("delta", 2, "add", 1.0)
        by_name = await run(served, presets=["strong", "lasting"], edits=[edit_message(further)])
        spelt_out = [
            edit for name in ("strong", "lasting") for p in info.edit_presets if p.name == name for edit in p.edits
        ]
        assert by_name == await run(served, edits=[*spelt_out, edit_message(further)])
        plain = edited_model(served.backbone, served.dictionaries)
        prompt = served.backbone.encode_text("Once upon").ids
        strong = [read_edit(edit) for edit in info.edit_presets[1].edits]
        assert await run(served, presets=["strong"]) == plain.greedy(prompt, 8, strong)[0]
        assert await run(served, presets=["strong"]) != await run(served)

        unknown = await refused(served, presets=["strong", "weak"])
        assert unknown.code is grpc.StatusCode.NOT_FOUND
        assert unknown.resources == [("saeserve.v1.EditPreset", "weak")]
        assert unknown.message == "no edit preset named 'weak'; there are: lasting, strong"
        repeated = await refused(served, presets=["lasting", "lasting"])
        assert (repeated.code, repeated.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["presets[1]"])
        conflict = await refused(served, edit_message(Edit("mid", 3, "scale", 1.0)), presets=["strong"])
        assert (conflict.code, conflict.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["edits"])
        assert "both write feature 3 of 'mid'" in conflict.message
        too_many = await refused(served, *[edit_message(further)] * 5, presets=["strong"])
        assert (too_many.code, too_many.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["edits"])
        assert "has 7 entries, those of presets included, more than max_edits = 6" in too_many.message


async def test_a_preset_of_a_dictionary_that_is_not_loaded_fails_when_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "edits.yaml"
    file.write_text("- {name: a, edits: [{feature: 'gone:1', set: 1}]}")
    with caplog.at_level(logging.WARNING):
        async for served in serve(ReplicaSettings(limits=LIMITS, edit_presets=str(file))):
            assert "preset 'a' needs gone" in caplog.text
            assert (await refused(served, presets=["a"])).resources == [("saeserve.v1.Dictionary", "gone")]


@pytest.mark.parametrize("tokens", ["last", "mean", "max"])
async def test_resampling_runs_the_reference_text(served: Served, tokens: str) -> None:
    for reference in (common_pb2.TextInput(text="Another text"), common_pb2.TextInput(token_ids={"ids": [9, 50, 3]})):
        message = pb.Edit(dictionary="mid", feature=3)
        message.resample.reference.CopyFrom(reference)
        message.resample.tokens = pb.ReferenceTokens.Value(f"REFERENCE_TOKENS_{tokens.upper()}")
        dictionary = served.dictionaries["mid"]
        # The feature of the reference that differs most, so that the rule matters.
        ids = tuple(reference.token_ids.ids) or tuple(served.backbone.encode_text("Another text").ids)
        z = dictionary.encode_dense(_activations(served, ids, dictionary.site))
        message.feature = int((z.amax(0) - z.mean(0)).argmax())
        (resolved,) = resolve_references([read_edit(message)], served.dictionaries, served.backbone)
        assert resolved.operation == "set"
        plain = edited_model(served.backbone, served.dictionaries)
        expected, _ = plain.greedy(served.backbone.encode_text("Once upon").ids, 8, [resolved])
        assert await run(served, edits=[message]) == expected


def _activations(served: Served, ids: tuple[int, ...], site: str) -> Any:
    return served.backbone.activations(torch.tensor([ids]), sites=[site])[site][0]


async def test_aligned_resampling_equals_a_value_at_each_position(served: Served) -> None:
    message = pb.Edit(dictionary="early", feature=3)
    message.resample.reference.text = "Never again!"
    message.resample.tokens = pb.REFERENCE_TOKENS_ALIGNED
    z = served.dictionaries["early"].encode_dense(
        _activations(served, tuple(served.backbone.encode_text("Never again!").ids), "0.resid_post_mlp")
    )
    message.feature = int(z.mean(0).argmax())
    edits = [
        Edit("early", message.feature, "set", float(v), positions=(t,)) for t, v in enumerate(z[:, message.feature])
    ]
    plain = edited_model(served.backbone, served.dictionaries)
    expected, _ = plain.greedy(served.backbone.encode_text("Once upon").ids, 8, edits)
    assert await run(served, edits=[message]) == expected


async def test_after_a_text_that_spans_the_end_of_the_prompt(served: Served) -> None:
    """The text is the prompt's last two bytes and the first that is generated unedited."""
    prompts = ["Once upon", "The cat", "Hello", "abc", "0, 1, 2", "def f(x)", "A dog", "Why", "Sea", "To be"]
    firsts = [served.backbone.token_bytes((await run(served, text=prompt))[0]) for prompt in prompts]
    prompt, first = next((p, f) for p, f in zip(prompts, firsts, strict=True) if f.isascii())  # one byte a token
    message = pb.Edit(dictionary="mid", feature=3, set=pb.Amount(value=2, unit=pb.UNIT_RECORDED_MAXIMUM))
    message.positions.after.text = prompt[-2:] + first.decode()
    tokens = served.backbone.encode_text(prompt).ids
    maximum = float(served.dictionaries["mid"].statistics.max[3])
    # The first token after the text is the second generated one.
    edit = Edit("mid", 3, "set", 2 * maximum, positions=tuple(range(len(tokens) + 1, len(tokens) + 10)))
    expected, _ = edited_model(served.backbone, served.dictionaries).greedy(tokens, 8, [edit])
    assert await run(served, edits=[message], text=prompt) == expected


async def test_fields_are_named_wherever_they_are(served: Served) -> None:
    inner = pb.Condition(any_of=pb.Conditions(conditions=[pb.Condition(feature=1), pb.Condition(feature=9999)]))
    nested = pb.Condition(all_of=pb.Conditions(conditions=[pb.Condition(threshold=-1), inner]))
    wrong = [
        pb.Edit(dictionary="mid", feature=1, scale=1, condition=nested),
        pb.Edit(dictionary="mid", feature=2, scale=1, condition=pb.Condition(dictionary="delta", feature=1)),
        pb.Edit(dictionary="mid", feature=3, set=pb.Amount(value=float("nan"))),
    ]
    failed = await refused(served, *wrong)
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failed.fields == [
        "edits[0].condition.all_of.conditions[0].threshold",
        "edits[0].condition.all_of.conditions[1].any_of.conditions[1].feature",
        "edits[2].set.value",
    ]
    failed = await refused(served, wrong[1])
    assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["edits[0].condition"])
    assert "reads 'delta' at 2.resid_delta_attn, after the edit's site 1.resid_post_mlp" in failed.message
    failed = await refused(served, pb.Edit(dictionary="mid", scale=1, condition=pb.Condition(dictionary="gone")))
    assert (failed.code, failed.resources) == (grpc.StatusCode.NOT_FOUND, [("saeserve.v1.Dictionary", "gone")])


async def test_a_reference_that_is_too_strong_is_refused() -> None:
    limits = LIMITS.model_copy(update={"max_edit_strength": 1e-6})
    async for served in serve(ReplicaSettings(limits=limits)):
        message = pb.Edit(dictionary="early", feature=3)
        message.resample.reference.text = "Another text"
        message.resample.tokens = pb.REFERENCE_TOKENS_MAX
        z = served.dictionaries["early"].encode_dense(
            _activations(served, tuple(served.backbone.encode_text("Another text").ids), "0.resid_post_mlp")
        )
        message.feature = int(z.amax(0).argmax())
        failed = await refused(served, message)
        assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["edits[0].resample"])
        assert "more than max_edit_strength = 1e-06" in failed.message


async def test_the_largest_relative_change_is_a_setting() -> None:
    limits = LIMITS.model_copy(update={"max_relative_change": 0.5})
    async for served in serve(ReplicaSettings(limits=limits)):
        info = await served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
        assert info.limits.max_relative_change == 0.5
        weak = edit_message(Edit("early", 3, "add", 1e-3))
        assert len(await run(served, edits=[weak])) == 8
        failed = await refused(served, edit_message(Edit("early", 3, "add", 40.0)))
        assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "max_relative_change = 0.5" in failed.message


async def test_edit_that_needs_statistics_the_dictionary_lacks(served: Served) -> None:
    request = intervention_pb.GenerateRequest(
        prompt=common_pb2.TextInput(text="a"),
        edits=[
            pb.Edit(dictionary="plain", feature=1, ablate=pb.ABLATION_MEAN),
            pb.Edit(
                dictionary="plain",
                feature=2,
                set=pb.Amount(value=1, unit=pb.UNIT_RECORDED_MAXIMUM),
            ),
        ],
    )
    failed = await failure(served.interventions.Generate(request))
    assert failed.code == grpc.StatusCode.FAILED_PRECONDITION
    precondition = failed.detail(error_details_pb2.PreconditionFailure)
    assert [violation.subject for violation in precondition.violations] == ["edits[0].ablate", "edits[1].set.unit"]
