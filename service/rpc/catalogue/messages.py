"""Records of a catalogue as messages, and the names of enums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from sae_runtime.catalogue.records import (
    CatalogueInfo,
    Context,
    FeaturePage,
    FeatureSummary,
    Flag,
    Label,
    Neighbor,
    Sort,
    TokenFigure,
)
from service.pb.saeserve.v1 import catalogue_pb2 as pb

Kind = TypeVar("Kind", bound=Message)

FLAGS: Mapping[int, Flag] = {
    pb.FEATURE_FLAG_DEAD: "dead",
    pb.FEATURE_FLAG_DENSE: "dense",
    pb.FEATURE_FLAG_POSITIONAL: "positional",
    pb.FEATURE_FLAG_SINGLE_TOKEN: "single_token",
}
SORTS: Mapping[int, Sort] = {
    pb.FEATURE_SORT_UNSPECIFIED: "feature",
    pb.FEATURE_SORT_FEATURE: "feature",
    pb.FEATURE_SORT_FIRING_RATE: "firing_rate",
    pb.FEATURE_SORT_LABEL_F1: "label_f1",
    pb.FEATURE_SORT_MAX_ACTIVATION: "max_activation",
    pb.FEATURE_SORT_TOKEN_R2: "token_r2",
    pb.FEATURE_SORT_ABLATION_KL: "ablation_kl",
    pb.FEATURE_SORT_OUTPUT_SCORE: "output_score",
}
_FLAG_VALUES = {flag: value for value, flag in FLAGS.items()}


def catalogue_message(info: CatalogueInfo) -> pb.CatalogueInfo:
    return _same_fields(pb.CatalogueInfo, info)


def summary_message(summary: FeatureSummary) -> pb.FeatureSummary:
    return _same_fields(pb.FeatureSummary, summary, flags=[_FLAG_VALUES[flag] for flag in summary.flags])


def label_message(label: Label) -> pb.FeatureLabel:
    predicate = json.dumps(dict(label.predicate)) if label.predicate else ""
    return _same_fields(pb.FeatureLabel, label, predicate_json=predicate)


def page_message(page: FeaturePage, neighbors: Sequence[pb.FeatureNeighbor]) -> pb.FeaturePage:
    """`neighbors` are those of the page, with their labels."""
    return _same_fields(
        pb.FeaturePage,
        page,
        summary=summary_message(page.summary),
        labels=[label_message(label) for label in page.labels],
        active_tokens=_token_messages(page.active_tokens),
        promoted=_token_messages(page.promoted),
        suppressed=_token_messages(page.suppressed),
        neighbors=neighbors,
        contexts=[_context_message(context) for context in page.contexts],
    )


def neighbor_message(neighbor: Neighbor, label: str) -> pb.FeatureNeighbor:
    return _same_fields(pb.FeatureNeighbor, neighbor, label=label)


def _token_messages(tokens: Sequence[TokenFigure]) -> list[pb.TokenFigure]:
    return [_same_fields(pb.TokenFigure, token) for token in tokens]


def _context_message(context: Context) -> pb.FeatureContext:
    return _same_fields(pb.FeatureContext, context, place=_same_fields(pb.ContextPlace, context.place))


def _same_fields(kind: type[Kind], record: object, **converted: Message | Sequence[Any] | str) -> Kind:
    """A message with the record's fields, but for the `converted` ones. What is None is not set."""
    names = [field.name for field in kind.DESCRIPTOR.fields if field.name not in converted]
    return kind(**{name: getattr(record, name) for name in names}, **converted)
