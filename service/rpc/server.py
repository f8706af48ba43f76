"""ServerService: the server itself."""

from __future__ import annotations

import re

from sae_runtime.model.sites import LOCATIONS
from sae_runtime.version import installed_version
from service.engine.settings import EngineSettings
from service.pb.saeserve.v1 import server_service_pb2 as pb
from service.rpc.call import Call
from service.rpc.limits import Limits
from service.rpc.model import ServedModel

_LIBRARIES = ("torch", "transformers", "ray")
_FOLDERS = re.compile(r"(?<![^\s'\"(])/(?:[^/:\n'\"()]+/)*(?=[^/\s])")
"""The folders of an absolute path: where a server keeps its files is not for clients. Its log has the whole path."""


class ServerRpc:
    """Handlers of ServerService."""

    def __init__(self, model: ServedModel, limits: Limits, engine_settings: EngineSettings) -> None:
        backbone = model.backbone
        # None of this changes while the replica runs.
        self._info = pb.GetServerInfoResponse(
            version=installed_version("saeserve") or "",
            library_versions={name: version for name in _LIBRARIES if (version := installed_version(name))},
            backbone=pb.Backbone(
                name=backbone.name,
                fingerprint=backbone.fingerprint,
                n_layers=backbone.n_layers,
                d_model=backbone.d_model,
                vocab_size=backbone.vocab_size,
                context_length=backbone.context_length,
                dtype=str(backbone.dtype).removeprefix("torch."),
                sites=[f"{layer}.{location}" for layer in range(backbone.n_layers) for location in LOCATIONS],
            ),
            dictionaries=list(model.dictionaries),
            limits=pb.Limits(
                **limits.model_dump(exclude={"default_new_tokens"}),
                max_concurrent_generations=engine_settings.max_concurrent_generations,
                max_queued_tokens=engine_settings.max_queued_tokens,
                max_cache_tokens=engine_settings.max_cache_tokens,
            ),
            cache_bytes=engine_settings.max_cache_tokens * backbone.cache_bytes_per_token,
            device=str(backbone.device),
            edit_presets=model.presets,
            notes=[_FOLDERS.sub("", note) for note in model.notes],
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, call: Call) -> pb.GetServerInfoResponse:
        reply = pb.GetServerInfoResponse(request_id=call.request_id)
        reply.MergeFrom(self._info)
        return reply
