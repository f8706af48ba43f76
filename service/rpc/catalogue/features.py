"""ListFeatures, GetFeature, NeighborFeatures: what the catalogue of a dictionary says of its features."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sae_runtime.catalogue.annotations import Annotations
from sae_runtime.catalogue.records import FeatureFilter, Flag, Neighbor, Sort
from sae_runtime.causal.report import FeatureId
from service.feature_messages import FLAGS, SORTS, neighbor_message, page_message, summary_message
from service.pb.saeserve.v1 import catalogue_pb2 as pb
from service.rpc.call import Call
from service.rpc.checks import Violations
from service.rpc.errors import Violation, invalid_argument, not_in_catalogue
from service.rpc.limits import Limits
from service.rpc.model import ServedModel

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1_000


@dataclass(frozen=True, eq=False)
class CatalogueRpc:
    """Handlers of what reads catalogues."""

    model: ServedModel
    limits: Limits

    async def ListFeatures(self, request: pb.ListFeaturesRequest, call: Call) -> pb.ListFeaturesResponse:
        chosen, sort = self._read_list(request)
        annotations = self.model.require_catalogue(request.dictionary)
        fingerprint = self.model.dictionaries[request.dictionary].fingerprint
        offset = _read_token(request, fingerprint)
        limit = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)

        def read() -> pb.ListFeaturesResponse:
            assert annotations.catalogue is not None
            total = annotations.catalogue.count(chosen)
            summaries = annotations.summaries(
                chosen, sort=sort, descending=request.descending, offset=offset, limit=limit
            )
            end = offset + len(summaries)
            return pb.ListFeaturesResponse(
                request_id=call.request_id,
                fingerprint=fingerprint,
                features=[summary_message(summary) for summary in summaries],
                next_page_token=_token(request, fingerprint, end) if end < total else "",
                total=total,
            )

        return await asyncio.to_thread(read)

    def _read_list(self, request: pb.ListFeaturesRequest) -> tuple[FeatureFilter, Sort]:
        violations = Violations(self.limits)
        violations.check_dictionary_name(request.dictionary, "dictionary")
        violations.check_enum("sort", request.sort, SORTS)
        max_rate = request.max_rate if request.HasField("max_rate") else 1.0
        violations.check_range("min_rate", request.min_rate, 1)
        violations.check_range("max_rate", max_rate, 1)
        violations.check_range("min_label_f1", request.min_label_f1, 1)
        with_flags = _read_flags(request.with_flags, "with_flags", violations)
        without_flags = _read_flags(request.without_flags, "without_flags", violations)
        violations.raise_if_any()
        chosen = FeatureFilter(with_flags, without_flags, request.min_rate, max_rate, request.min_label_f1)
        return chosen, SORTS[request.sort]

    async def GetFeature(self, request: pb.GetFeatureRequest, call: Call) -> pb.GetFeatureResponse:
        annotations = self._require(request)

        def read() -> pb.GetFeatureResponse:
            page = annotations.page(request.feature)
            if page is None:  # the dictionary has it, but its catalogue was cut short
                raise not_in_catalogue(request.dictionary, request.feature)
            return pb.GetFeatureResponse(
                request_id=call.request_id,
                fingerprint=self.model.dictionaries[request.dictionary].fingerprint,
                page=page_message(replace(page, neighbors=self._with_labels(page.neighbors))),
            )

        return await asyncio.to_thread(read)

    async def NeighborFeatures(self, request: pb.NeighborFeaturesRequest, call: Call) -> pb.NeighborFeaturesResponse:
        annotations = self._require(request)

        def read() -> pb.NeighborFeaturesResponse:
            assert annotations.catalogue is not None
            neighbors = self._with_labels(annotations.catalogue.neighbors(request.feature))
            return pb.NeighborFeaturesResponse(
                request_id=call.request_id,
                fingerprint=self.model.dictionaries[request.dictionary].fingerprint,
                neighbors=[neighbor_message(neighbor) for neighbor in neighbors],
            )

        return await asyncio.to_thread(read)

    def _require(self, request: pb.GetFeatureRequest | pb.NeighborFeaturesRequest) -> Annotations:
        violations = Violations(self.limits)
        violations.check_dictionary_name(request.dictionary, "dictionary")
        violations.raise_if_any()
        self.model.require([request.dictionary])
        self.model.require_features([FeatureId(request.dictionary, request.feature)])
        return self.model.require_catalogue(request.dictionary)

    def _with_labels(self, neighbors: Sequence[Neighbor]) -> tuple[Neighbor, ...]:
        """With their labels, as far as their dictionaries are loaded. Reads files."""
        labels: dict[str, dict[int, str]] = {}
        for name in {neighbor.dictionary for neighbor in neighbors} & set(self.model.annotations):
            n_latents = self.model.dictionaries[name].n_latents
            features = [near.feature for near in neighbors if near.dictionary == name and near.feature < n_latents]
            labels[name] = self.model.annotations[name].labels_of(features)
        return tuple(replace(near, label=labels.get(near.dictionary, {}).get(near.feature, "")) for near in neighbors)


def _read_flags(numbers: Sequence[pb.FeatureFlag.ValueType], field: str, violations: Violations) -> tuple[Flag, ...]:
    for place, number in enumerate(numbers):
        violations.check_enum(f"{field}[{place}]", number, FLAGS)
    return tuple(dict.fromkeys(FLAGS[number] for number in numbers if number in FLAGS))


# A page token is where the next page begins, and a digest of the list that it belongs to.


def _token(request: pb.ListFeaturesRequest, fingerprint: str, offset: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([offset, _digest(request, fingerprint)]).encode()).decode()


def _read_token(request: pb.ListFeaturesRequest, fingerprint: str) -> int:
    """Where the page begins. RpcError INVALID_ARGUMENT for a token that no such list has."""
    if not request.page_token:
        return 0
    try:
        offset, digest = json.loads(base64.b64decode(request.page_token, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        offset = digest = None
    if type(offset) is not int or not 0 <= offset < 2**63 or digest != _digest(request, fingerprint):
        reason = "is not the next_page_token of a list of the same dictionary, order and conditions"
        raise invalid_argument([Violation("page_token", reason)])
    return offset


def _digest(request: pb.ListFeaturesRequest, fingerprint: str) -> str:
    what = pb.ListFeaturesRequest()
    what.CopyFrom(request)
    for field in ("request_id", "page_size", "page_token"):
        what.ClearField(field)
    return hashlib.sha256(fingerprint.encode() + what.SerializeToString(deterministic=True)).hexdigest()[:16]
