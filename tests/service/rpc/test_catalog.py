"""The catalogue says what is served."""

from __future__ import annotations

import pytest

from service.pb.saeserve.v1 import catalog_service_pb2
from tests.service.conftest import Served

pytestmark = pytest.mark.any_cpu


async def test_catalog(served: Served) -> None:
    listed = await served.catalog.ListDictionaries(catalog_service_pb2.ListDictionariesRequest(request_id="c-1"))
    assert listed.request_id == "c-1"
    assert [d.name for d in listed.dictionaries] == sorted(served.dictionaries)
    reply = await served.catalog.GetDictionary(catalog_service_pb2.GetDictionaryRequest(name="mid"))
    mid = reply.dictionary
    assert (mid.site, mid.architecture, mid.d_in, mid.n_latents, mid.k) == ("1.resid_post_mlp", "topk", 32, 96, 8)
    assert mid.normalizes_input
    assert mid.has_statistics
    assert not next(d for d in listed.dictionaries if d.name == "plain").has_statistics
    assert not reply.HasField("provenance")


async def test_what_dictionaries_of_every_family_are(families: Served) -> None:
    reply = await families.catalog.ListDictionaries(catalog_service_pb2.ListDictionariesRequest())
    found = {d.name: (d.architecture, d.k, d.normalization, d.normalizes_input) for d in reply.dictionaries}
    assert found["jumprelu"] == ("jumprelu", 0, "none", False)
    assert found["gated"] == ("gated", 0, "none", False)
    assert found["groupmax"] == ("groupmax", 8, "constant_norm", True)
    assert [d.name for d in reply.dictionaries if d.has_skip_connection] == ["skip"]
    assert [d.name for d in reply.dictionaries if d.transcoder] == ["transcoder"]
