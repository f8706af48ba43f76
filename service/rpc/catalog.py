"""CatalogService: what is served."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import TYPE_CHECKING

from service.feature_messages import catalogue_message
from service.pb.saeserve.v1 import catalog_service_pb2 as pb
from service.rpc.call import Call
from service.rpc.errors import Violation, invalid_argument
from service.rpc.model import ServedModel

if TYPE_CHECKING:
    from sae_runtime.dictionary.manifest import Provenance


class CatalogRpc:
    """Handlers of CatalogService."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    async def ListDictionaries(self, request: pb.ListDictionariesRequest, call: Call) -> pb.ListDictionariesResponse:
        return pb.ListDictionariesResponse(
            request_id=call.request_id,
            dictionaries=[self._describe(name) for name in self._model.dictionaries],
        )

    async def GetDictionary(self, request: pb.GetDictionaryRequest, call: Call) -> pb.GetDictionaryResponse:
        if not request.name:
            raise invalid_argument([Violation("name", "is empty, expected a dictionary's name")])
        self._model.require([request.name])
        dictionary = self._model.dictionaries[request.name]
        annotations = self._model.annotations[request.name]
        hidden = 0 if annotations.written is None else await asyncio.to_thread(annotations.written.n_hidden)
        reply = pb.GetDictionaryResponse(
            request_id=call.request_id, dictionary=self._describe(request.name), hidden_labels=hidden
        )
        if annotations.catalogue is not None:
            reply.catalogue.CopyFrom(catalogue_message(annotations.catalogue.info))
        if dictionary.manifest is not None:
            reply.provenance.CopyFrom(_provenance(dictionary.manifest.provenance))
            reply.evaluation.update(dictionary.manifest.evaluation)
        return reply

    def _describe(self, name: str) -> pb.Dictionary:
        dictionary = self._model.dictionaries[name]
        manifest = dictionary.manifest
        return pb.Dictionary(
            name=name,
            site=dictionary.site or "",
            architecture=dictionary.activation,
            d_in=dictionary.d_in,
            n_latents=dictionary.n_latents,
            k=dictionary.k or 0,
            normalizes_input=dictionary.normalizes_input,
            normalization=dictionary.normalization,
            has_skip_connection=dictionary.skip is not None,
            transcoder=dictionary.transcoder,
            has_statistics=dictionary.statistics is not None,
            context_length=0 if manifest is None else manifest.context_length or 0,
            fingerprint=dictionary.fingerprint,
            has_catalogue=self._model.annotations[name].catalogue is not None,
        )


def _provenance(provenance: Provenance) -> pb.Provenance:
    message = pb.Provenance(
        code_version=provenance.code_version,
        seed=provenance.seed or 0,
        tokens=provenance.tokens or 0,
        data=provenance.data,
        config_json=json.dumps(provenance.config, sort_keys=True) if provenance.config else "",
    )
    if provenance.created:
        try:
            message.created.FromDatetime(datetime.fromisoformat(provenance.created))
        except ValueError:  # what somebody else's manifest says about its date is no reason to fail
            message.ClearField("created")
    return message
