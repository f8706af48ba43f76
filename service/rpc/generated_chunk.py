"""New tokens of a generation as a message."""

from __future__ import annotations

from service.arrays import dictionary_features_bytes, length_delimited
from service.engine.work import GeneratedTokens, TokenFeatures
from service.pb.saeserve.v1 import intervention_service_pb2 as pb
from service.rpc.text_inputs import TextInputReader


def pack_chunk(tokens: GeneratedTokens, reader: TextInputReader) -> pb.GeneratedChunk:
    """`reader` knows the bytes of tokens."""
    chunk = pb.GeneratedChunk(text=tokens.text, token_ids=tokens.ids, logprobs=tokens.logprobs)
    for likeliest in tokens.top:
        ids = [token for token, _ in likeliest]
        chunk.top.add(token_ids=ids, logprobs=[logprob for _, logprob in likeliest], pieces=reader.pieces(ids))
    chunk.features.extend(_pack_features(features, reader) for features in tokens.features)
    return chunk


def _pack_features(tokens: TokenFeatures, reader: TextInputReader) -> pb.TokenFeatures:
    # The arrays as wire bytes, see service.arrays; field 4 is `dictionaries`.
    message = pb.TokenFeatures.FromString(
        b"".join(
            length_delimited(4, dictionary_features_bytes(name, csr.row_splits, csr.indices, csr.values, None))
            for name, csr in tokens.features.items()
        )
    )
    message.first_position = tokens.first_position
    message.token_ids.extend(tokens.ids)
    message.pieces.extend(reader.pieces(tokens.ids))
    return message
