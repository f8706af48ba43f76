"""Deadlines and metadata of calls."""

from __future__ import annotations

import math
from typing import Any

import pytest

from service.client import DeadlineExceeded
from tests.service.client.both_clients import Run, items, value
from tests.service.client.fake_server import FakeServer


def test_calls_end_at_their_deadline(run: Run):
    with pytest.raises(DeadlineExceeded):
        run(lambda client: value(client.extract_features("wait", "resid-mid", timeout_s=0.2)))
    with pytest.raises(DeadlineExceeded):
        run(lambda client: value(client.generate("wait", timeout_s=0.2).result()))


def test_the_server_is_told_the_deadline(run: Run, fake: FakeServer):
    run(lambda client: value(client.extract_features("a", "resid-mid", timeout_s=50)), timeout_s=5000)
    run(lambda client: value(client.generate("a", timeout_s=500).result()), generate_timeout_s=5000)
    # gRPC sends a timeout in few digits, rounded up.
    assert 0 < fake.time_left_s["ExtractFeatures"] < 60 < fake.time_left_s["Generate"] < 600


def test_default_deadlines_are_the_clients(run: Run, fake: FakeServer):
    run(lambda client: value(client.extract_features("a", "resid-mid")), timeout_s=50)
    run(lambda client: value(client.generate("a").result()), generate_timeout_s=500)
    # gRPC sends a timeout in few digits, rounded up.
    assert 0 < fake.time_left_s["ExtractFeatures"] < 60 < fake.time_left_s["Generate"] < 600


def test_no_deadline(run: Run, fake: FakeServer):
    run(lambda client: value(client.server_info(timeout_s=math.inf)))
    assert fake.time_left_s["GetServerInfo"] > 1e9  # gRPC has no word for never
    with pytest.raises(ValueError, match="timeout_s is 0"):
        run(lambda client: value(client.server_info(timeout_s=0)))


def test_metadata_goes_with_every_call(run: Run, fake: FakeServer):
    async def script(client: Any) -> None:
        await value(client.extract_features("a"))
        await items(client.extract_features_stream(["a"]))
        await value(client.generate("a").result())

    run(script, metadata=[("authorization", "Bearer 1")])
    assert {method for method, _, _ in fake.calls} >= {"ExtractFeatures", "ExtractFeaturesStream", "Generate"}
    assert all(metadata["authorization"] == "Bearer 1" for _, _, metadata in fake.calls)
