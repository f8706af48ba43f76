"""Another language by reflection alone: Node with @grpc/grpc-js and no code of ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.arrays import unpack_sparse_rows
from service.pb.saeserve.v1 import feature_service_pb2 as feature_pb
from service.pb.saeserve.v1.common_pb2 import TextInput
from service.pb.saeserve.v1.feature_service_pb2_grpc import FeatureServiceStub
from tests.e2e.running_service import RunningService

FOLDER = Path(__file__).parent / "node"
INSTALL_TIMEOUT_S = 240


@pytest.fixture(scope="module")
def node() -> str:
    """The node program, with the packages that the script needs."""
    programs = {name: shutil.which(name) for name in ("node", "npm")}
    for name, program in programs.items():
        if program is None:
            pytest.skip(f"{name} is not installed")
    if not (FOLDER / "node_modules" / "@grpc" / "proto-loader").is_dir():
        install = [str(programs["npm"]), "install", "--no-package-lock", "--no-audit", "--no-fund"]
        try:
            subprocess.run(install, cwd=FOLDER, check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm could not install @grpc/grpc-js: {error}")
    return str(programs["node"])


def test_node_extracts_and_generates(service: RunningService, channel: grpc.Channel, node: str) -> None:
    script = [node, "call_by_reflection.mjs", service.grpc_address, "mid", "naïve"]
    ended = subprocess.run(script, cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout)
    assert {"saeserve.v1.FeatureService", "grpc.health.v1.Health"} <= set(seen["services"])

    request = feature_pb.ExtractFeaturesRequest(
        inputs=[TextInput(text="naïve")],
        dictionaries=["mid"],
        include_tokens=True,
        selection=feature_pb.FeatureSelection(top_k=3),
    )
    [result] = FeatureServiceStub(channel).ExtractFeatures(request, timeout=60).results
    splits, indices, values = unpack_sparse_rows(result.dictionaries[0].features)
    assert seen["row_splits"] == splits.tolist()
    assert seen["indices"] == indices.tolist()
    np.testing.assert_allclose(seen["values"], values, atol=1e-5)
    assert len(seen["tokens"]) == len(result.tokens.pieces)
    assert len(seen["generated_ids"]) == 8
    assert seen["finish"] == "FINISH_REASON_LENGTH"
