"""Malformed requests of Score, AblateFeatures, AttributeFeatures and ContrastFeatures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from service.pb.saeserve.v1 import catalog_service_pb2 as catalog_pb
from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import edits_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as feature_pb
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
    inputs_defects,
    names_defects,
    texts,
)


def services(facts: Facts) -> Iterator[Service]:
    yield "Score", lambda rng, d: _score(d), _score_defects(facts)
    yield "AblateFeatures", lambda rng, d: _ablate(rng, d), _ablate_defects(facts)
    yield "AttributeFeatures", lambda rng, d: _attribute(d), _attribute_defects(facts)
    yield "ContrastFeatures", lambda rng, d: _contrast(d), _contrast_defects(facts)


def _score(dictionary: catalog_pb.Dictionary) -> pb.ScoreRequest:
    edit = edits_pb2.Edit(dictionary=dictionary.name, feature=0, set=edits_pb2.Amount(value=0.01))
    return pb.ScoreRequest(inputs=texts("Once upon", "a time"), edits=[edit], logit_tokens=[pb.TokenChoice(id=1)])


def _ablate(rng: random.Random, dictionary: catalog_pb.Dictionary) -> pb.AblateFeaturesRequest:
    feature = rng.randrange(dictionary.n_latents)
    return pb.AblateFeaturesRequest(
        inputs=texts("Once upon"), features=[pb.FeatureKey(dictionary=dictionary.name, feature=feature)]
    )


def _attribute(dictionary: catalog_pb.Dictionary) -> pb.AttributeFeaturesRequest:
    return pb.AttributeFeaturesRequest(
        input=texts("Once")[0], dictionaries=[dictionary.name], target=pb.TokenChoice(id=3), count=2
    )


def _contrast(dictionary: catalog_pb.Dictionary) -> pb.ContrastFeaturesRequest:
    return pb.ContrastFeaturesRequest(
        a=texts("ab", "cd"), b=texts("12", "34"), dictionaries=[dictionary.name], suggest=1, validate=True
    )


def _token_defects(facts: Facts, field: str) -> Defects:
    """Of a TokenChoice, the first of a repeated field or a single one."""

    def token(request: Any) -> Any:
        found = getattr(request, field)
        return found[0] if field == "logit_tokens" else found

    return {
        f"{field} empty": (INVALID, lambda r: (token(r).Clear(), token(r).SetInParent())),
        f"{field} outside": (INVALID, lambda r: setattr(token(r), "id", facts.vocab_size)),
        f"{field} far outside": (INVALID, lambda r: setattr(token(r), "id", MAX_UINT32)),
        f"{field} of no token": (INVALID, lambda r: setattr(token(r), "text", "")),
        f"{field} of several tokens": (INVALID, lambda r: setattr(token(r), "text", "ab cd ef gh")),
        f"{field} very long": (INVALID, lambda r: setattr(token(r), "text", "a" * 10_000)),
    }


def _measured_defects(facts: Facts) -> Defects:
    """Of texts whose predictions are measured, and of `logit_tokens`."""
    most = facts.limits.max_logit_tokens
    return inputs_defects(facts) | {
        "input of one token": (INVALID, lambda r: r.inputs[0].token_ids.ids.append(1)),
        "too many chosen tokens": (
            INVALID,
            lambda r: r.logit_tokens.extend([pb.TokenChoice(id=i) for i in range(most + 1)]),
        ),
        "chosen token twice": (INVALID, lambda r: r.logit_tokens.extend([pb.TokenChoice(id=2)] * 2)),
    }


def _score_defects(facts: Facts) -> Defects:
    def edit(**fields: Any) -> Callable[[Any], object]:
        return lambda r: r.edits[0].MergeFrom(edits_pb2.Edit(**fields))

    return (
        _measured_defects(facts)
        | _token_defects(facts, "logit_tokens")
        | {
            "edit of an unknown dictionary": (NOT_FOUND, edit(dictionary="nowhere")),
            "edit of a feature outside": (INVALID, edit(feature=MAX_UINT32)),
            "edit NaN": (INVALID, edit(set=edits_pb2.Amount(value=NAN))),
            "edits that conflict": (INVALID, lambda r: r.edits.add().CopyFrom(r.edits[0])),
            "too many edits": (INVALID, lambda r: [r.edits.add() for _ in range(facts.limits.max_edits)]),
            "preset unknown": (NOT_FOUND, lambda r: r.presets.append("nowhere")),
        }
    )


def _ablate_defects(facts: Facts) -> Defects:
    limits = facts.limits
    outside = max(d.n_latents for d in facts.dictionaries)

    def strongest(count: int, *names: str) -> Callable[[Any], object]:
        def spoil(request: Any) -> None:
            request.ClearField("features")
            request.strongest.CopyFrom(pb.StrongestFeatures(count=count, dictionaries=names))

        return spoil

    name = facts.dictionaries[0].name
    defects: Defects = {
        "no features": (INVALID, lambda r: r.ClearField("features")),
        "feature twice": (INVALID, lambda r: r.features.add().CopyFrom(r.features[0])),
        "feature outside": (NOT_FOUND, lambda r: setattr(r.features[0], "feature", outside)),
        "feature far outside": (NOT_FOUND, lambda r: setattr(r.features[0], "feature", MAX_UINT32)),
        "feature without a dictionary": (INVALID, lambda r: r.features[0].ClearField("dictionary")),
        "feature of an unknown dictionary": (NOT_FOUND, lambda r: setattr(r.features[0], "dictionary", "nowhere")),
        "too many features": (
            INVALID,
            lambda r: r.features.extend(
                pb.FeatureKey(dictionary=name, feature=i) for i in range(limits.max_ablated_features + 1)
            ),
        ),
        "features and strongest": (
            INVALID,
            lambda r: r.strongest.CopyFrom(pb.StrongestFeatures(count=1, dictionaries=[name])),
        ),
        "strongest 0": (INVALID, strongest(0, name)),
        "too many strongest": (INVALID, strongest(limits.max_ablated_features + 1, name)),
        "strongest of nothing": (INVALID, strongest(1)),
        "strongest of an unknown dictionary": (NOT_FOUND, strongest(1, "nowhere")),
        "ablation unknown": (INVALID, lambda r: r.ablations.append(7)),
        "ablation twice": (INVALID, lambda r: r.ablations.extend([1, 0])),
        "ranking unknown": (INVALID, lambda r: setattr(r, "rank_by", 9)),
        "too many variants": (INVALID, lambda r: setattr(r, "single_tokens", MAX_UINT32)),
    }
    for dictionary in facts.dictionaries:
        if not dictionary.has_statistics:

            def lacking(request: Any, name: str = dictionary.name) -> None:
                request.features[0].dictionary, request.features[0].feature = name, 0
                request.ablations.append(edits_pb2.ABLATION_MEAN)

            defects[f"mean of {dictionary.name}, which has no statistics"] = (PRECONDITION, lacking)
    return defects | _measured_defects(facts)


def _attribute_defects(facts: Facts) -> Defects:
    return (
        names_defects(facts)
        | _token_defects(facts, "target")
        | {
            "no input": (INVALID, lambda r: r.ClearField("input")),
            "input without a text": (INVALID, lambda r: (r.input.Clear(), r.input.SetInParent())),
            "foil is the target": (INVALID, lambda r: setattr(r.foil, "id", 3)),
            "position behind the text": (INVALID, lambda r: setattr(r, "position", 4)),
            "position far behind": (INVALID, lambda r: setattr(r, "position", MAX_UINT32)),
            "too many attributions": (INVALID, lambda r: setattr(r, "count", facts.limits.max_attributions + 1)),
            "overflow unknown": (INVALID, lambda r: setattr(r, "overflow", 9)),
        }
    )


def _contrast_defects(facts: Facts) -> Defects:
    limits = facts.limits
    many = limits.max_contrast_tokens // facts.context_length + 1

    def too_many_tokens(request: Any) -> None:
        for _ in range(many):
            request.b.add().token_ids.ids.extend([1] * facts.context_length)

    return names_defects(facts) | {
        "no texts in a": (INVALID, lambda r: r.ClearField("a")),
        "one text in b": (INVALID, lambda r: r.b.pop()),
        "too many texts": (INVALID, lambda r: r.a.extend(texts(*["ab"] * limits.max_contrast_texts))),
        "too many tokens together": (INVALID, too_many_tokens),
        "text without a text": (INVALID, lambda r: r.b[1].Clear()),
        "sum as aggregation": (INVALID, lambda r: setattr(r, "aggregation", feature_pb.AGGREGATION_SUM)),
        "aggregation unknown": (INVALID, lambda r: setattr(r, "aggregation", 99)),
        "rate NaN": (INVALID, lambda r: setattr(r, "false_discovery_rate", NAN)),
        "rate over 1": (INVALID, lambda r: setattr(r, "false_discovery_rate", INF)),
        "rate negative": (INVALID, lambda r: setattr(r, "false_discovery_rate", -0.1)),
        "too many listed": (INVALID, lambda r: setattr(r, "count", limits.max_selected_features + 1)),
        "too many suggested": (INVALID, lambda r: setattr(r, "suggest", limits.max_edits + 1)),
        "validation of nothing": (INVALID, lambda r: r.ClearField("suggest")),
    }
