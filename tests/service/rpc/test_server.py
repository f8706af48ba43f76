"""The server says what it is."""

from __future__ import annotations

import pytest

from sae_runtime.model.sites import LOCATIONS
from service.pb.saeserve.v1 import server_service_pb2
from tests.service.conftest import LIMITS, Served

pytestmark = pytest.mark.any_cpu


async def test_server_info(served: Served) -> None:
    info = await served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    assert info.request_id
    assert info.backbone.fingerprint == served.backbone.fingerprint
    assert list(info.dictionaries) == sorted(served.dictionaries)
    assert len(info.backbone.sites) == served.backbone.n_layers * len(LOCATIONS)
    assert info.library_versions["torch"]
    assert info.device == "cpu"
    limits = served.runtime.limits
    assert info.limits.max_tokens_per_input == served.backbone.context_length
    assert info.limits.max_text_bytes == limits.max_text_bytes == LIMITS.max_text_bytes
    assert info.limits.max_queued_tokens == served.runtime.settings.engine.max_queued_tokens
    assert info.limits.max_concurrent_generations == served.runtime.settings.engine.max_concurrent_generations
