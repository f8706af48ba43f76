"""Malformed requests about what features mean. No dictionary needs a catalogue: what is malformed is refused before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from service.pb.saeserve.v1 import catalog_service_pb2 as catalog_pb
from service.pb.saeserve.v1 import catalogue_pb2 as pb
from tests.service.rpc.malformed.common import (
    INF,
    INVALID,
    MAX_UINT32,
    NAN,
    NOT_FOUND,
    Defects,
    Facts,
    Service,
    dictionary_defects,
    set_fields,
    text_defects,
    texts,
)


def services(facts: Facts) -> Iterator[Service]:
    def one(kind: Any) -> Any:
        def make(rng: random.Random, dictionary: catalog_pb.Dictionary) -> Any:
            return kind(dictionary=dictionary.name, feature=rng.randrange(dictionary.n_latents))

        return make

    feature_defects: Defects = {"feature outside": (NOT_FOUND, lambda r: set_fields(r, feature=MAX_UINT32))}
    yield "ListFeatures", lambda rng, d: pb.ListFeaturesRequest(dictionary=d.name), dictionary_defects() | _list()
    yield "GetFeature", one(pb.GetFeatureRequest), dictionary_defects() | feature_defects
    yield "NeighborFeatures", one(pb.NeighborFeaturesRequest), dictionary_defects() | feature_defects
    yield "LabelFeature", one(pb.LabelFeatureRequest), dictionary_defects() | feature_defects | _label()
    yield "SearchFeatures", lambda rng, d: pb.SearchFeaturesRequest(fires_on=texts("ab", "cd")), _search(facts)


def _list() -> Defects:
    return {
        "sort unknown": (INVALID, lambda r: set_fields(r, sort=99)),
        "flag unspecified": (INVALID, lambda r: r.with_flags.append(0)),
        "flag unknown": (INVALID, lambda r: r.without_flags.append(-5)),
        "rate NaN": (INVALID, lambda r: set_fields(r, min_rate=NAN)),
        "rate infinite": (INVALID, lambda r: set_fields(r, max_rate=INF)),
        "rate negative": (INVALID, lambda r: set_fields(r, min_rate=-0.1)),
        "F1 over 1": (INVALID, lambda r: set_fields(r, min_label_f1=1.5)),
    }


def _label() -> Defects:
    return {
        "long text": (INVALID, lambda r: set_fields(r, text="x" * 100_000)),
        "line break": (INVALID, lambda r: set_fields(r, text="a\nb")),
        "escape sequence": (INVALID, lambda r: set_fields(r, text="\x1b[31mred")),
        "label of a rule": (INVALID, lambda r: set_fields(r, text="x", source="rule")),
        "long author": (INVALID, lambda r: set_fields(r, text="x", author="A" * 101)),
    }


def _search(facts: Facts) -> Defects:
    most = facts.limits.max_inputs
    return text_defects(facts, lambda r: r.fires_on[1]) | {
        "nothing": (INVALID, lambda r: r.Clear()),
        "words and texts": (INVALID, lambda r: set_fields(r, query="x")),
        "huge query": (INVALID, lambda r: set_fields(r, query="x" * (facts.limits.max_text_bytes + 1))),
        "too many texts": (INVALID, lambda r: r.silent_on.extend(texts(*["a"] * most))),
        "dictionary twice": (INVALID, lambda r: r.dictionaries.extend(["mid", "mid"])),
        "dictionary unknown": (NOT_FOUND, lambda r: r.dictionaries.append("nowhere")),
    }
