"""Texts and token ids of requests: offsets of their tokens, and what is dropped of long ones."""

from __future__ import annotations

import numpy as np

from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from tests.service.conftest import Served
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
