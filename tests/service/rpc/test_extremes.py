"""Numbers at the ends of the ranges that requests may use: the reply is right and finite, or the request is refused."""

from __future__ import annotations

import math
from typing import Any

import grpc
import numpy as np
import pytest

from service.arrays import pack_tensor
from service.pb.saeserve.v1 import causal_pb2, common_pb2, edits_pb2, intervention_service_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from tests.service.conftest import Served

SMALLEST, LARGEST = 1.4e-45, 3.4028234e38  # of positive float32 numbers
STRENGTHS = [SMALLEST, -SMALLEST, 1e-30, 1e4, -1e4, 1e20, LARGEST, -LARGEST]
TEXT = common_pb2.TextInput(text="Once upon")


def operations(value: float) -> list[dict[str, Any]]:
    raw, relative = edits_pb2.UNIT_UNSPECIFIED, edits_pb2.UNIT_RECORDED_MAXIMUM
    return [
        {"set": edits_pb2.Amount(value=value, unit=raw)},
        {"set": edits_pb2.Amount(value=value, unit=relative)},
        {"add": edits_pb2.Amount(value=value, unit=raw)},
        {"scale": value},
        {"clamp": edits_pb2.Clamp(minimum=value)},
        {"clamp": edits_pb2.Clamp(maximum=value)},
        {"set": edits_pb2.Amount(value=1), "condition": edits_pb2.Condition(feature=1, threshold=abs(value))},
    ]


async def code_of(call: Any) -> grpc.StatusCode:
    """OK, or the status of a refused request; replies that are not finite fail."""
    try:
        if hasattr(call, "__aiter__"):
            replies = [reply async for reply in call]
            numbers = [x for reply in replies for x in reply.chunk.logprobs]
        else:
            reply = await call
            numbers = [x for score in reply.results for scored in (score.unedited, score.edited) for x in scored.loss]
    except grpc.aio.AioRpcError as error:
        return error.code()
    assert all(map(math.isfinite, numbers))
    return grpc.StatusCode.OK


@pytest.mark.parametrize("value", STRENGTHS)
@pytest.mark.parametrize("dictionary", ["mid", "early", "plain", "delta"])
async def test_strengths_of_edits(served: Served, value: float, dictionary: str) -> None:
    """With and without statistics, TopK and ReLU. Too strong an edit is the client's fault, never INTERNAL."""
    codes = set()
    for operation in operations(value):
        edit = edits_pb2.Edit(dictionary=dictionary, feature=3, **operation)
        request = intervention_service_pb2.GenerateRequest(
            prompt=TEXT, max_new_tokens=3, ignore_end_of_text=True, edits=[edit]
        )
        codes.add(await code_of(served.interventions.Generate(request)))
        codes.add(await code_of(served.interventions.Score(causal_pb2.ScoreRequest(inputs=[TEXT], edits=[edit]))))
    assert codes <= {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,  # relative strengths without statistics
    }
    if abs(value) < 1e-20:
        assert grpc.StatusCode.OK in codes


@pytest.mark.parametrize("size", [SMALLEST, 1e-30, 1e30, LARGEST])
@pytest.mark.parametrize("dictionary", ["mid", "early", "wide", "plain"])
async def test_activations_of_any_finite_size(served: Served, size: float, dictionary: str) -> None:
    """Encoded activations are finite, or the request is refused."""
    width = served.dictionaries[dictionary].d_in
    rows = (size * np.sign(np.random.default_rng(0).normal(size=(3, width)))).astype(np.float32)
    call = served.features.EncodeActivations(
        pb.EncodeActivationsRequest(dictionary=dictionary, activations=pack_tensor(rows))
    )
    code = await call.code()
    if code == grpc.StatusCode.OK:
        assert np.isfinite((await call).features.values).all()
    else:
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert size > 1


@pytest.mark.parametrize("threshold", [0.0, SMALLEST, LARGEST])
async def test_thresholds_of_extracted_features(served: Served, threshold: float) -> None:
    selection = pb.FeatureSelection(threshold=threshold)
    reply = await served.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(inputs=[TEXT], dictionaries=["mid"], selection=selection)
    )
    values = reply.results[0].dictionaries[0].features.values
    assert all(value > threshold for value in values)
    assert bool(values) == (threshold < 1)
