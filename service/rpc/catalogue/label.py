"""LabelFeature: writes what a feature means."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from sae_runtime.catalogue.label_store import MAX_NAME_CHARACTERS, checked_text
from sae_runtime.catalogue.records import Label
from sae_runtime.causal.report import FeatureId
from service.feature_messages import label_message
from service.pb.saeserve.v1 import catalogue_pb2 as pb
from service.rpc.call import Call
from service.rpc.checks import Violations
from service.rpc.errors import Violation, failed_precondition, unavailable
from service.rpc.limits import Limits
from service.rpc.model import LACKS_CATALOGUE, ServedModel


@dataclass(frozen=True, eq=False)
class LabelRpc:
    """The handler of LabelFeature."""

    model: ServedModel
    limits: Limits

    async def LabelFeature(self, request: pb.LabelFeatureRequest, call: Call) -> pb.LabelFeatureResponse:
        self._check(request)
        store = self.model.annotations[request.dictionary].written
        if store is None:
            reason = "has a file of labels that cannot be used; the server's log says why"
            raise failed_precondition([Violation("dictionary", reason)], LACKS_CATALOGUE)
        source = request.source or "person"
        try:
            if request.text:
                label = Label(request.text, source, author=request.author)
                replaced = await asyncio.to_thread(store.write, request.feature, label)
            else:
                replaced = await asyncio.to_thread(store.remove, request.feature, source)
        except TimeoutError:
            raise unavailable("other labels are being written") from None
        return pb.LabelFeatureResponse(
            request_id=call.request_id,
            fingerprint=self.model.dictionaries[request.dictionary].fingerprint,
            replaced=None if replaced is None else label_message(replaced),
        )

    def _check(self, request: pb.LabelFeatureRequest) -> None:
        violations = Violations(self.limits)
        violations.check_dictionary_name(request.dictionary, "dictionary")
        for field, text in (("text", request.text), ("source", request.source), ("author", request.author)):
            try:
                if text:
                    checked_text(text) if field == "text" else checked_text(text, field, MAX_NAME_CHARACTERS)
            except ValueError as error:
                violations.add(field, str(error).removeprefix(f"{field} "))
        if request.source == "rule":
            violations.add("source", 'is "rule", whose labels only a catalogue has')
        violations.raise_if_any()
        self.model.require([request.dictionary])
        self.model.require_features([FeatureId(request.dictionary, request.feature)])
