"""The server says what it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_runtime.model.sites import LOCATIONS
from service.engine.settings import EngineSettings
from service.pb.saeserve.v1 import server_service_pb2
from service.replica import ReplicaSettings, ServiceRuntime
from service.rpc.call import Call
from service.rpc.server import ServerRpc
from tests import golden
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


async def test_what_was_noted_of_the_files_is_told(tmp_path: Path) -> None:
    """As `saeserve serve` prints it: warnings of a replica would end in a log that nobody reads."""
    folder = tmp_path / "model"
    shutil.copytree(golden.FOLDER / "hooks_gpt2_tiny", folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"v_head.bias": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    runtime = await ServiceRuntime.start(ReplicaSettings(backbone=str(folder), dictionaries=()))
    await runtime.stop()
    assert list(runtime.model.notes) == [f"{folder}: these weights are not used: v_head.bias"]
    served = ServerRpc(runtime.model, LIMITS, EngineSettings())
    told = (await served.GetServerInfo(server_service_pb2.GetServerInfoRequest(), Call())).notes
    assert list(told) == ["model: these weights are not used: v_head.bias"], "where its files lie is not for clients"


@pytest.mark.parametrize(
    ("note", "told"),
    [
        ("/srv/my models/gpt2: these weights are not used", "gpt2: these weights are not used"),
        ("dictionary a: /srv/a/features.sqlite: no such file", "dictionary a: features.sqlite: no such file"),
        ("cfg.json: 1/2 of the rows, and/or 'x/y'", "cfg.json: 1/2 of the rows, and/or 'x/y'"),
        ("cannot read '/srv/a/b.pt' (/tmp/c)", "cannot read 'b.pt' (c)"),
    ],
)
async def test_notes_name_files_without_their_folders(served: Served, note: str, told: str) -> None:
    model = replace(served.runtime.model, notes=[note])
    rpc = ServerRpc(model, LIMITS, EngineSettings())
    reply = await rpc.GetServerInfo(server_service_pb2.GetServerInfoRequest(), Call())
    assert list(reply.notes) == [told]


async def test_without_anything_to_note(served: Served) -> None:
    reply = await served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    assert list(reply.notes) == []
