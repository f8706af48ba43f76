"""Texts and token ids of requests: offsets of their tokens, and what is dropped of long ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from tokenizers import normalizers

from service.pb.saeserve.v1 import causal_pb2, common_pb2, edits_pb2, intervention_service_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.replica import ReplicaSettings
from tests.builders import byte_tokenizer, small_backbone
from tests.service.conftest import LIMITS, Served, serve
from tests.service.rpc.reading import dense


def text_ids(served: Served, text: str) -> list[int]:
    return served.backbone.encode_text(text).ids


async def test_offsets_of_tokens(served: Served) -> None:
    text = "é😀!"
    reply = await served.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(
            inputs=[
                common_pb2.TextInput(text=text),
                common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=text_ids(served, text))),
                # Begins inside the emoji.
                common_pb2.TextInput(token_ids=common_pb2.TokenIds(ids=text_ids(served, text)[3:])),
            ],
            dictionaries=["mid"],
            include_tokens=True,
        )
    )
    for tokens in (reply.results[0].tokens, reply.results[1].tokens):
        assert b"".join(tokens.pieces).decode() == text
        assert list(tokens.byte_starts) == [0, 1, 2, 3, 4, 5, 6]
        assert list(tokens.byte_ends) == [1, 2, 3, 4, 5, 6, 7]
        assert list(tokens.char_starts) == [0, 0, 1, 1, 1, 1, 2]
        assert list(tokens.char_ends) == [1, 1, 2, 2, 2, 2, 3]
    cut = reply.results[2].tokens
    assert b"".join(cut.pieces) == text.encode()[3:]
    assert list(cut.byte_ends) == [1, 2, 3, 4]
    assert list(cut.char_starts) == sorted(cut.char_starts)


async def test_truncation_drops_the_end_and_counts_it(served: Served) -> None:
    limit = served.runtime.limits.max_tokens_per_input
    text = "ab" * limit
    reply = await served.features.ExtractFeatures(
        pb.ExtractFeaturesRequest(
            inputs=[common_pb2.TextInput(text=text)],
            dictionaries=["mid"],
            include_tokens=True,
            overflow=common_pb2.OVERFLOW_TRUNCATE,
        )
    )
    result = reply.results[0]
    assert (result.n_tokens, result.truncated_tokens) == (limit, limit)
    assert b"".join(result.tokens.pieces) == text[:limit].encode()
    assert len(result.tokens.byte_ends) == limit
    cut = common_pb2.TextInput(text=text[:limit])
    whole = await served.features.ExtractFeatures(pb.ExtractFeaturesRequest(inputs=[cut], dictionaries=["mid"]))
    found, expected = (
        dense(each.dictionaries[0].features, served.dictionaries["mid"]) for each in (result, whole.results[0])
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Texts that the tokenizer knows and the model cannot take

Call = Callable[[Served, common_pb2.TextInput], Awaitable[Any]]


async def extract(served: Served, text: common_pb2.TextInput) -> Any:
    return await served.features.ExtractFeatures(pb.ExtractFeaturesRequest(inputs=[text], dictionaries=["mid"]))


async def extract_stream(served: Served, text: common_pb2.TextInput) -> Any:
    request = pb.ExtractFeaturesRequest(inputs=[text], dictionaries=["mid"])
    call = served.features.ExtractFeaturesStream(iter([pb.ExtractFeaturesStreamRequest(request=request)]))
    return [reply async for reply in call]


async def generate(served: Served, text: common_pb2.TextInput) -> Any:
    request = intervention_service_pb2.GenerateRequest(prompt=text, max_new_tokens=2)
    return [reply async for reply in served.interventions.Generate(request)]


async def generate_with_a_reference(served: Served, text: common_pb2.TextInput) -> Any:
    resample = edits_pb2.Resample(reference=text, tokens=edits_pb2.REFERENCE_TOKENS_LAST)
    edit = edits_pb2.Edit(dictionary="mid", feature=1, resample=resample)
    prompt = common_pb2.TextInput(text="ab")
    request = intervention_service_pb2.GenerateRequest(prompt=prompt, max_new_tokens=2, edits=[edit])
    return [reply async for reply in served.interventions.Generate(request)]


async def score(served: Served, text: common_pb2.TextInput) -> Any:
    return await served.interventions.Score(causal_pb2.ScoreRequest(inputs=[text]))


async def ablate(served: Served, text: common_pb2.TextInput) -> Any:
    return await served.interventions.AblateFeatures(
        causal_pb2.AblateFeaturesRequest(inputs=[text], features=[causal_pb2.FeatureKey(dictionary="mid", feature=1)])
    )


async def attribute(served: Served, text: common_pb2.TextInput) -> Any:
    return await served.interventions.AttributeFeatures(
        causal_pb2.AttributeFeaturesRequest(input=text, dictionaries=["mid"])
    )


async def contrast(served: Served, text: common_pb2.TextInput) -> Any:
    plain = common_pb2.TextInput(text="ab")
    return await served.interventions.ContrastFeatures(
        causal_pb2.ContrastFeaturesRequest(a=[plain, plain], b=[text, plain], dictionaries=["mid"])
    )


CALLS = [extract, extract_stream, generate, generate_with_a_reference, score, ablate, attribute, contrast]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("length", ["short", "long"])
async def test_a_text_that_spells_a_token_past_the_embedding(call: Call, length: str) -> None:
    """A padding token was added to the tokenizer, and the model was not resized."""
    backbone = small_backbone(tokenizer=byte_tokenizer("[PAD]"))
    text = f"{'a' * (3000 if length == 'long' else 1)}[PAD] here"
    settings = ReplicaSettings(limits=LIMITS.model_copy(update={"max_text_bytes": 10_000}))
    async for served in serve(settings, backbone=backbone):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(served, common_pb2.TextInput(text=text))
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        details = failed.value.details() or ""
        assert ".text: holds '[PAD]' at byte" in details
        assert "token id 257 of the tokenizer, which is outside the model's vocabulary of 257" in details
        assert await call(served, common_pb2.TextInput(text="a plain text"))  # and nothing else has changed


async def test_a_logit_token_past_the_embedding() -> None:
    async for served in serve(ReplicaSettings(limits=LIMITS), backbone=small_backbone(tokenizer=byte_tokenizer("[P]"))):
        request = causal_pb2.AttributeFeaturesRequest(
            input=common_pb2.TextInput(text="ab"), dictionaries=["mid"], target=causal_pb2.TokenChoice(text="[P]")
        )
        with pytest.raises(grpc.aio.AioRpcError, match="token id 257"):
            await served.interventions.AttributeFeatures(request)


@pytest.mark.parametrize("call", CALLS)
async def test_a_text_that_the_tokenizer_would_change(call: Call) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    async for served in serve(ReplicaSettings(limits=LIMITS), backbone=small_backbone(tokenizer=tokenizer)):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(served, common_pb2.TextInput(text="cafe\u0301"))
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert ".text: the tokenizer changes the text" in (failed.value.details() or "")
