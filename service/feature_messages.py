"""Records of a catalogue as messages, and messages as records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from sae_runtime.catalogue.records import (
    CatalogueInfo,
    Context,
    FeaturePage,
    FeatureSummary,
    Flag,
    Label,
    Neighbor,
    Place,
    Sort,
    TokenFigure,
)
from service.pb.saeserve.v1 import catalogue_pb2 as pb

Kind = TypeVar("Kind", bound=Message)
Record = TypeVar("Record")

FLAGS: Mapping[pb.FeatureFlag.ValueType, Flag] = {
    pb.FEATURE_FLAG_DEAD: "dead",
    pb.FEATURE_FLAG_DENSE: "dense",
    pb.FEATURE_FLAG_POSITIONAL: "positional",
    pb.FEATURE_FLAG_SINGLE_TOKEN: "single_token",
}
SORTS: Mapping[pb.FeatureSort.ValueType, Sort] = {
    pb.FEATURE_SORT_UNSPECIFIED: "feature",
    pb.FEATURE_SORT_FEATURE: "feature",
    pb.FEATURE_SORT_FIRING_RATE: "firing_rate",
    pb.FEATURE_SORT_LABEL_F1: "label_f1",
    pb.FEATURE_SORT_MAX_ACTIVATION: "max_activation",
    pb.FEATURE_SORT_TOKEN_R2: "token_r2",
    pb.FEATURE_SORT_ABLATION_KL: "ablation_kl",
    pb.FEATURE_SORT_OUTPUT_SCORE: "output_score",
}
FLAG_VALUES: Mapping[str, pb.FeatureFlag.ValueType] = {flag: value for value, flag in FLAGS.items()}
SORT_VALUES: Mapping[str, pb.FeatureSort.ValueType] = {sort: value for value, sort in SORTS.items()}


def catalogue_message(info: CatalogueInfo) -> pb.CatalogueInfo:
    return _same_fields(pb.CatalogueInfo, info)


def summary_message(summary: FeatureSummary) -> pb.FeatureSummary:
    return _same_fields(pb.FeatureSummary, summary, flags=[FLAG_VALUES[flag] for flag in summary.flags])


def label_message(label: Label) -> pb.FeatureLabel:
    predicate = json.dumps(dict(label.predicate)) if label.predicate else ""
    return _same_fields(pb.FeatureLabel, label, predicate_json=predicate)


def page_message(page: FeaturePage) -> pb.FeaturePage:
    return _same_fields(
        pb.FeaturePage,
        page,
        summary=summary_message(page.summary),
        labels=[label_message(label) for label in page.labels],
        active_tokens=_token_messages(page.active_tokens),
        promoted=_token_messages(page.promoted),
        suppressed=_token_messages(page.suppressed),
        neighbors=[neighbor_message(neighbor) for neighbor in page.neighbors],
        contexts=[_context_message(context) for context in page.contexts],
    )


def neighbor_message(neighbor: Neighbor) -> pb.FeatureNeighbor:
    return _same_fields(pb.FeatureNeighbor, neighbor)


def read_summary(message: pb.FeatureSummary) -> FeatureSummary:
    return _record(
        FeatureSummary,
        message,
        **_set_fields(message, "label_f1"),
        flags=tuple(FLAGS[flag] for flag in message.flags if flag in FLAGS),  # a newer server may know more
        top_tokens=tuple(message.top_tokens),
    )


def read_label(message: pb.FeatureLabel) -> Label:
    predicate = json.loads(message.predicate_json or "{}")
    return _record(Label, message, predicate=predicate, **_set_fields(message, "f1", "precision", "recall"))


def read_neighbor(message: pb.FeatureNeighbor) -> Neighbor:
    return _record(Neighbor, message)


def read_page(message: pb.FeaturePage) -> FeaturePage:
    return _record(
        FeaturePage,
        message,
        summary=read_summary(message.summary),
        labels=tuple(map(read_label, message.labels)),
        histogram=tuple(message.histogram),
        rate_by_position=tuple(message.rate_by_position),
        rate_by_kind=dict(message.rate_by_kind),
        rate_by_language=dict(message.rate_by_language),
        active_tokens=_read_tokens(message.active_tokens),
        promoted=_read_tokens(message.promoted),
        suppressed=_read_tokens(message.suppressed),
        neighbors=tuple(map(read_neighbor, message.neighbors)),
        contexts=tuple(map(_read_context, message.contexts)),
        **_set_fields(message, "token_r2", "ablation_kl", "output_score"),
    )


def _read_tokens(messages: Iterable[pb.TokenFigure]) -> tuple[TokenFigure, ...]:
    return tuple(_record(TokenFigure, message) for message in messages)


def _read_context(message: pb.FeatureContext) -> Context:
    return _record(
        Context,
        message,
        tokens=tuple(message.tokens),
        activations=tuple(message.activations),
        place=_record(Place, message.place),
    )


def _token_messages(tokens: Sequence[TokenFigure]) -> list[pb.TokenFigure]:
    return [_same_fields(pb.TokenFigure, token) for token in tokens]


def _context_message(context: Context) -> pb.FeatureContext:
    return _same_fields(pb.FeatureContext, context, place=_same_fields(pb.ContextPlace, context.place))


def _same_fields(kind: type[Kind], record: object, **converted: Message | Sequence[Any] | str) -> Kind:
    """A message with the record's fields, but for the `converted` ones. What is None is not set."""
    names = [field.name for field in kind.DESCRIPTOR.fields if field.name not in converted]
    return kind(**{name: getattr(record, name) for name in names}, **converted)


def _set_fields(message: Message, *names: str) -> dict[str, Any]:
    """Optional fields; None where one is not set."""
    return {name: getattr(message, name) if message.HasField(name) else None for name in names}


def _record(kind: type[Record], message: Message, **converted: Any) -> Record:
    """A record with the message's fields, but for the `converted` ones."""
    names = [field.name for field in fields(cast(Any, kind)) if field.name not in converted]
    return kind(**{name: getattr(message, name) for name in names}, **converted)
