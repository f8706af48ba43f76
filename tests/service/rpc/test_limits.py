"""Limits are settings that the server tells and keeps to."""

from __future__ import annotations

import grpc

from service.pb.saeserve.v1 import causal_pb2 as pb
from service.pb.saeserve.v1 import server_service_pb2
from service.replica import ReplicaSettings
from tests.service.conftest import LIMITS, serve
from tests.service.rpc.intervention.texts import TEXTS, inputs
from tests.service.rpc.reading import failure


async def test_limits_are_settings_that_the_server_tells() -> None:
    tight = LIMITS.model_copy(
        update={
            "max_ablated_features": 2,
            "max_variant_tokens": 100,
            "max_logit_tokens": 1,
            "max_attributions": 3,
            "max_contrast_texts": 2,
            "max_contrast_tokens": 30,
        }
    )
    async for served in serve(ReplicaSettings(limits=tight)):
        told = (await served.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())).limits
        assert (told.max_ablated_features, told.max_variant_tokens, told.max_logit_tokens) == (2, 100, 1)
        assert (told.max_attributions, told.max_contrast_texts, told.max_contrast_tokens) == (3, 2, 30)
        keys = [pb.FeatureKey(dictionary="mid", feature=i) for i in range(3)]
        two = [pb.TokenChoice(id=1), pb.TokenChoice(id=2)]
        stub = served.interventions
        cases = {
            "features": stub.AblateFeatures(pb.AblateFeaturesRequest(inputs=inputs(), features=keys)),
            "inputs": stub.AblateFeatures(
                pb.AblateFeaturesRequest(inputs=inputs(*TEXTS[:3]), features=keys[:2], single_tokens=1)
            ),
            "logit_tokens": stub.Score(pb.ScoreRequest(inputs=inputs(), logit_tokens=two)),
            "count": stub.AttributeFeatures(
                pb.AttributeFeaturesRequest(input=inputs("abc")[0], dictionaries=["mid"], count=4)
            ),
            "a": stub.ContrastFeatures(
                pb.ContrastFeaturesRequest(a=inputs("a", "b", "c"), b=inputs("a", "b"), dictionaries=["mid"])
            ),
        }
        for field, call in cases.items():
            failed = await failure(call)
            assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
