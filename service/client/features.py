"""Requests about what features mean, and their replies."""

from __future__ import annotations

from collections.abc import Sequence

from sae_runtime.catalogue.records import Flag, Sort
from service.client import catalog
from service.client.messages import OVERFLOWS, named_value, text_inputs
from service.client.options import Inputs, OverflowName
from service.feature_messages import FLAG_VALUES, SORT_VALUES, read_page, read_summary
from service.pb.saeserve.v1 import catalogue_pb2


def list_features_request(
    dictionary: str,
    *,
    sort: Sort = "feature",
    descending: bool = False,
    with_flags: Sequence[Flag] = (),
    without_flags: Sequence[Flag] = (),
    min_rate: float = 0.0,
    max_rate: float = 1.0,
    min_label_f1: float = 0.0,
    page_size: int | None = None,
    page_token: str = "",
    request_id: str | None = None,
) -> catalogue_pb2.ListFeaturesRequest:
    return catalogue_pb2.ListFeaturesRequest(
        request_id=request_id or "",
        dictionary=dictionary,
        sort=named_value("sort", sort, SORT_VALUES),
        descending=descending,
        with_flags=[named_value("with_flags", flag, FLAG_VALUES) for flag in with_flags],
        without_flags=[named_value("without_flags", flag, FLAG_VALUES) for flag in without_flags],
        min_rate=min_rate,
        max_rate=max_rate,
        min_label_f1=min_label_f1,
        page_size=page_size or 0,
        page_token=page_token,
    )


def search_features_request(
    query: str,
    dictionaries: Sequence[str],
    *,
    fires_on: Inputs = (),
    silent_on: Inputs = (),
    limit: int | None = None,
    overflow: OverflowName = "error",
    request_id: str | None = None,
) -> catalogue_pb2.SearchFeaturesRequest:
    return catalogue_pb2.SearchFeaturesRequest(
        request_id=request_id or "",
        query=query,
        dictionaries=dictionaries,
        fires_on=text_inputs(fires_on),
        silent_on=text_inputs(silent_on),
        limit=limit or 0,
        overflow=named_value("overflow", overflow, OVERFLOWS),
    )


def read_feature_list(reply: catalogue_pb2.ListFeaturesResponse) -> catalog.FeatureList:
    return catalog.FeatureList(
        features=tuple(map(read_summary, reply.features)),
        next_page_token=reply.next_page_token,
        total=reply.total,
        fingerprint=reply.fingerprint,
        request_id=reply.request_id,
    )


def read_feature_details(reply: catalogue_pb2.GetFeatureResponse) -> catalog.FeatureDetails:
    return catalog.FeatureDetails(read_page(reply.page), reply.fingerprint, reply.request_id)


def read_search(reply: catalogue_pb2.SearchFeaturesResponse) -> catalog.FeatureSearch:
    return catalog.FeatureSearch(
        hits=tuple(
            catalog.FeatureHit(hit.dictionary, hit.fingerprint, read_summary(hit.summary), hit.score, hit.activation)
            for hit in reply.hits
        ),
        without_catalogue=tuple(reply.without_catalogue),
        request_id=reply.request_id,
    )
