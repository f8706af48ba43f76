"""What makers of malformed requests share: facts about the server, and defects that several requests can have."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from service.pb.saeserve.v1 import catalog_service_pb2 as catalog_pb
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import server_service_pb2 as server_pb

Code = grpc.StatusCode
INVALID, NOT_FOUND, PRECONDITION = Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION
NAN, INF = float("nan"), float("inf")
MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True)
class Facts:
    """What the requests are made from."""

    info: server_pb.GetServerInfoResponse
    dictionaries: Sequence[catalog_pb.Dictionary]

    @property
    def limits(self) -> server_pb.Limits:
        return self.info.limits

    @property
    def vocab_size(self) -> int:
        return self.info.backbone.vocab_size

    @property
    def context_length(self) -> int:
        return self.info.backbone.context_length


Make = Callable[[random.Random, catalog_pb.Dictionary], Message]
Spoil = Callable[[Any], object]
"""Changes a valid request, in place."""
Defects = dict[str, tuple[grpc.StatusCode, Spoil]]
"""By name: the status that must come back, and the change that spoils a request."""
Service = tuple[str, Make, Defects]
"""An RPC's name, a maker of valid requests, and what spoils them."""


def set_fields(message: Any, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(message, name, value)


def texts(*contents: str) -> list[common_pb2.TextInput]:
    return [common_pb2.TextInput(text=content) for content in contents]


def request_id_defects() -> Defects:
    return {
        "long request id": (INVALID, lambda r: set_fields(r, request_id="x" * 129)),
        "request id with a line break": (INVALID, lambda r: set_fields(r, request_id="a\nb")),
        "request id beyond ASCII": (INVALID, lambda r: set_fields(r, request_id="ü")),
    }


def text_defects(facts: Facts, get: Callable[[Any], Any]) -> Defects:
    """`get` gives the TextInput of a request."""
    too_many = facts.context_length + 1
    return {
        "input not set": (INVALID, lambda r: get(r).Clear()),
        "empty text": (INVALID, lambda r: set_fields(get(r), text="")),
        "empty ids": (INVALID, lambda r: get(r).token_ids.CopyFrom(common_pb2.TokenIds())),
        "id outside the vocabulary": (INVALID, lambda r: get(r).token_ids.ids.extend([0, facts.vocab_size])),
        "id huge": (INVALID, lambda r: get(r).token_ids.ids.append(MAX_UINT32)),
        "too many ids": (INVALID, lambda r: get(r).token_ids.ids.extend([1] * too_many)),
        "very many ids": (INVALID, lambda r: get(r).token_ids.ids.extend([1] * 200_000)),
        "long text": (INVALID, lambda r: set_fields(get(r), text="a b " * (facts.limits.max_text_bytes // 4 + 1))),
        "overflow unknown": (INVALID, lambda r: set_fields(r, overflow=99)),
        "overflow negative": (INVALID, lambda r: set_fields(r, overflow=-1)),
    }


def dictionary_defects() -> Defects:
    return {
        "dictionary empty": (INVALID, lambda r: set_fields(r, dictionary="")),
        "dictionary unknown": (NOT_FOUND, lambda r: set_fields(r, dictionary="nowhere")),
    }


def names_defects(facts: Facts) -> Defects:
    return {
        "no dictionaries": (INVALID, lambda r: r.ClearField("dictionaries")),
        "dictionary twice": (INVALID, lambda r: r.dictionaries.append(r.dictionaries[0])),
        "dictionary unknown": (NOT_FOUND, lambda r: r.dictionaries.append("nowhere")),
        "dictionary empty": (INVALID, lambda r: r.dictionaries.append("")),
        "too many dictionaries": (
            INVALID,
            lambda r: r.dictionaries.extend(f"d{i}" for i in range(facts.limits.max_dictionaries)),
        ),
    }


def inputs_defects(facts: Facts) -> Defects:
    """Of the field `inputs`, as it is of every call that reads texts."""
    limits, length = facts.limits, facts.context_length
    many = limits.max_tokens_per_request // length + 1

    def too_many_tokens(request: Any) -> None:
        for _ in range(many):
            request.inputs.add().token_ids.ids.extend([1] * length)

    return {
        "no inputs": (INVALID, lambda r: r.ClearField("inputs")),
        "too many inputs": (INVALID, lambda r: r.inputs.extend(texts(*["ab"] * limits.max_inputs))),
        "too many tokens together": (INVALID, too_many_tokens),
    } | text_defects(facts, lambda r: r.inputs[0])
