"""Malformed requests of Generate: prompts, sampling and edits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from service.pb.saeserve.v1 import catalog_service_pb2 as catalog_pb
from service.pb.saeserve.v1 import common_pb2, edits_pb2
from service.pb.saeserve.v1 import intervention_service_pb2 as intervention_pb
from tests.service.rpc.malformed.common import (
    INF,
    INVALID,
    MAX_UINT32,
    NAN,
    NOT_FOUND,
    PRECONDITION,
    Defects,
    Facts,
    Service,
    Spoil,
    set_fields,
    text_defects,
)


def services(facts: Facts) -> Iterator[Service]:
    yield "Generate", lambda rng, d: _generate(rng, d), _generate_defects(facts) | _edit_defects(facts)


def _generate(rng: random.Random, dictionary: catalog_pb.Dictionary) -> intervention_pb.GenerateRequest:
    return intervention_pb.GenerateRequest(
        prompt=common_pb2.TextInput(text="Once"),
        max_new_tokens=2,
        sampling=intervention_pb.Sampling(temperature=1, seed=rng.randrange(1000)),
        stop=["\n\n"],
        edits=[
            edits_pb2.Edit(
                dictionary=dictionary.name,
                feature=rng.randrange(dictionary.n_latents),
                set=edits_pb2.Amount(value=0.01),
            )
        ],
    )


def _generate_defects(facts: Facts) -> Defects:
    limits = facts.limits

    def sampling(**fields: float) -> Spoil:
        return lambda r: set_fields(r.sampling, **fields)

    return text_defects(facts, lambda r: r.prompt) | {
        "no prompt": (INVALID, lambda r: r.ClearField("prompt")),
        "too many new tokens": (INVALID, lambda r: set_fields(r, max_new_tokens=limits.max_new_tokens + 1)),
        "very many new tokens": (INVALID, lambda r: set_fields(r, max_new_tokens=MAX_UINT32)),
        "temperature negative": (INVALID, sampling(temperature=-1)),
        "temperature NaN": (INVALID, sampling(temperature=NAN)),
        "temperature infinite": (INVALID, sampling(temperature=INF)),
        "temperature too large": (INVALID, sampling(temperature=101)),
        "top_p negative": (INVALID, sampling(top_p=-0.1)),
        "top_p over 1": (INVALID, sampling(top_p=1.01)),
        "top_p NaN": (INVALID, sampling(top_p=NAN)),
        "repetition penalty negative": (INVALID, sampling(repetition_penalty=-0.5)),
        "repetition penalty NaN": (INVALID, sampling(repetition_penalty=NAN)),
        "repetition penalty too large": (INVALID, sampling(repetition_penalty=1e6)),
        "too many samples": (INVALID, lambda r: set_fields(r, samples=limits.max_samples + 1)),
        "very many samples": (INVALID, lambda r: set_fields(r, samples=MAX_UINT32, compare=True)),
        "too many top logprobs": (INVALID, lambda r: set_fields(r, top_logprobs=limits.max_top_logprobs + 1)),
        "features of no dictionary": (INVALID, lambda r: r.features.SetInParent()),
        "features of an unknown dictionary": (NOT_FOUND, lambda r: r.features.dictionaries.append("nowhere")),
        "features of a dictionary twice": (
            INVALID,
            lambda r: r.features.dictionaries.extend([r.edits[0].dictionary] * 2),
        ),
        "features of an empty name": (INVALID, lambda r: r.features.dictionaries.append("")),
        "too many features": (
            INVALID,
            lambda r: r.features.MergeFrom(
                intervention_pb.WatchedFeatures(
                    dictionaries=[r.edits[0].dictionary], top_k=limits.max_selected_features + 1
                )
            ),
        ),
        "stop list of megabytes": (INVALID, lambda r: r.stop.extend(["x" * limits.max_stop_bytes] * 10_000)),
        "stop empty": (INVALID, lambda r: r.stop.append("")),
        "stop too long": (INVALID, lambda r: r.stop.append("x" * (limits.max_stop_bytes + 1))),
        "too many stops": (INVALID, lambda r: r.stop.extend(["x"] * limits.max_stop_strings)),
    }


def _edit_defects(facts: Facts) -> Defects:
    limits, pb = facts.limits, edits_pb2

    def edit(**fields: Any) -> Spoil:
        """Sets fields of the first edit."""
        return lambda r: r.edits[0].MergeFrom(pb.Edit(**fields))

    def conflict(request: Any) -> None:
        request.edits.add().CopyFrom(request.edits[0])
        request.edits[1].positions.explicit.positions.append(0)

    def combined(n: int = 1, **fields: Any) -> edits_pb2.Condition:
        return pb.Condition(any_of=pb.Conditions(conditions=[pb.Condition()] * n), **fields)

    def nested(depth: int) -> edits_pb2.Condition:
        condition = pb.Condition()
        for _ in range(depth):
            condition = pb.Condition(all_of=pb.Conditions(conditions=[condition]))
        return condition

    def reference(ids: list[int], tokens: int = 0) -> edits_pb2.Resample:
        return pb.Resample(reference=common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=ids)), tokens=tokens)

    def replace_twice(request: Any) -> None:
        request.edits[0].CopyFrom(pb.Edit(dictionary=request.edits[0].dictionary, replace=pb.Replace()))
        request.edits.add().CopyFrom(request.edits[0])

    def explicit(*positions: int) -> Spoil:
        return edit(positions=pb.Positions(explicit=pb.ExplicitPositions(positions=positions)))

    outside = max(d.n_latents for d in facts.dictionaries)
    defects: Defects = {
        "too many edits": (INVALID, lambda r: [r.edits.add() for _ in range(limits.max_edits)]),
        "edit without a dictionary": (INVALID, lambda r: r.edits[0].ClearField("dictionary")),
        "edit of an unknown dictionary": (NOT_FOUND, edit(dictionary="nowhere")),
        "edit of a feature outside": (INVALID, edit(feature=outside)),
        "edit of a feature far outside": (INVALID, edit(feature=MAX_UINT32)),
        "edit without an operation": (INVALID, lambda r: r.edits[0].ClearField("set")),
        "value NaN": (INVALID, edit(set=pb.Amount(value=NAN))),
        "value infinite": (INVALID, edit(add=pb.Amount(value=INF))),
        "unit unknown": (INVALID, edit(set=pb.Amount(value=1, unit=9))),
        "scale NaN": (INVALID, edit(scale=NAN)),
        "scale too strong": (INVALID, edit(scale=1.5 * limits.max_edit_strength)),
        "clamp without bounds": (INVALID, edit(clamp=pb.Clamp())),
        "clamp upside down": (INVALID, edit(clamp=pb.Clamp(minimum=0.2, maximum=0.1))),
        "clamp NaN": (INVALID, edit(clamp=pb.Clamp(minimum=NAN))),
        "ablation unknown": (INVALID, edit(ablate=7)),
        "positions without a rule": (INVALID, lambda r: r.edits[0].positions.SetInParent()),
        "range unknown": (INVALID, edit(positions=pb.Positions(range=9))),
        "no explicit positions": (INVALID, explicit()),
        "position twice": (INVALID, explicit(3, 3)),
        "position outside the context": (INVALID, explicit(facts.context_length)),
        "position far outside": (INVALID, explicit(MAX_UINT32)),
        "condition's feature outside": (INVALID, edit(condition=pb.Condition(feature=outside))),
        "condition's threshold NaN": (INVALID, edit(condition=pb.Condition(threshold=NAN))),
        "condition's threshold negative": (INVALID, edit(condition=pb.Condition(threshold=-1))),
        "condition's dictionary unknown": (NOT_FOUND, edit(condition=pb.Condition(dictionary="nowhere"))),
        "condition's comparison unknown": (INVALID, edit(condition=pb.Condition(comparison=9))),
        "condition's unit unknown": (INVALID, edit(condition=pb.Condition(unit=9))),
        "condition of none": (INVALID, edit(condition=pb.Condition(all_of=pb.Conditions()))),
        "condition both single and combined": (INVALID, edit(condition=combined(threshold=1))),
        "condition too deep": (INVALID, edit(condition=nested(5))),
        "condition far too deep": (INVALID, edit(condition=nested(40))),
        "condition of too many": (INVALID, edit(condition=combined(17))),
        "condition of very many": (INVALID, edit(condition=combined(20_000))),
        "after no text": (INVALID, edit(positions=pb.Positions(after=pb.AfterText()))),
        "after a long text": (INVALID, edit(positions=pb.Positions(after=pb.AfterText(text="é" * 129)))),
        "after each without a bound": (
            INVALID,
            edit(positions=pb.Positions(after=pb.AfterText(text="a", occurrence=2))),
        ),
        "occurrence unknown": (INVALID, edit(positions=pb.Positions(after=pb.AfterText(text="a", occurrence=7)))),
        "reference not set": (INVALID, edit(resample=pb.Resample())),
        "reference empty": (INVALID, edit(resample=pb.Resample(reference=common_pb2.TextInput(text="")))),
        "reference too long": (INVALID, edit(resample=reference([1] * (facts.context_length + 1)))),
        "reference outside the vocabulary": (INVALID, edit(resample=reference([facts.vocab_size]))),
        "reference tokens unknown": (INVALID, edit(resample=reference([1], tokens=8))),
        "replacement of a feature": (
            INVALID,
            lambda r: (edit(replace=pb.Replace())(r), set_fields(r.edits[0], feature=1)),
        ),
        "two replacements": (INVALID, lambda r: replace_twice(r)),
        "preset unknown": (NOT_FOUND, lambda r: r.presets.append("no such")),
        "presets too many": (INVALID, lambda r: r.presets.extend(["a"] * (limits.max_edits + 1))),
        "edits that conflict": (INVALID, conflict),
    }
    for dictionary in facts.dictionaries:
        if not dictionary.has_statistics:
            lacking = edit(dictionary=dictionary.name, feature=0, ablate=pb.ABLATION_MEAN)
            defects[f"mean of {dictionary.name}, which has no statistics"] = (PRECONDITION, lacking)
    return defects
