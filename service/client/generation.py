"""Reads the replies of a generation: chunks as they arrive, and whole sequences at their end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.client import results
from service.client.replies import read_labels, read_sparse_rows, read_timing
from service.pb.saeserve.v1 import intervention_service_pb2

_FINISH_REASONS: dict[int, results.FinishReason] = {
    intervention_service_pb2.FINISH_REASON_LENGTH: "length",
    intervention_service_pb2.FINISH_REASON_STOP: "stop",
    intervention_service_pb2.FINISH_REASON_END_OF_TEXT: "end_of_text",
}


class GenerationReader:
    """Reads the messages of one Generate stream, in order."""

    def __init__(self, request: intervention_service_pb2.GenerateRequest) -> None:
        self._n_sequences = max(request.samples, 1) * (2 if request.compare else 1)
        self._chunks: dict[tuple[bool, int], list[results.GeneratedChunk]] = {}
        self._finished: dict[tuple[bool, int], results.GenerationResult] = {}

    @property
    def complete(self) -> bool:
        """Whether all sequences have ended."""
        return len(self._finished) == self._n_sequences

    @property
    def ended(self) -> tuple[results.GenerationResult, ...]:
        """The sequences that have ended, in full: the edited ones by sample, then the unedited ones."""
        return tuple(self._finished[key] for key in sorted(self._finished))

    def read(self, message: intervention_service_pb2.GenerateResponse) -> results.GeneratedChunk | None:
        """The message's chunk, or None if it is the end of a sequence."""
        key = (message.unedited, message.sample)
        if message.HasField("chunk"):
            chunk = results.GeneratedChunk(
                text=message.chunk.text,
                token_ids=np.array(message.chunk.token_ids, np.uint32),
                logprobs=np.array(message.chunk.logprobs, np.float32),
                top=tuple(_read_top_tokens(top) for top in message.chunk.top),
                features=tuple(_read_token_features(features) for features in message.chunk.features),
                sample=message.sample,
                unedited=message.unedited,
                labels=read_labels(message.chunk.labels),
            )
            self._chunks.setdefault(key, []).append(chunk)
            return chunk
        if message.HasField("finish"):
            self._finished[key] = self._finish(message, self._chunks.pop(key, []))
        return None

    @staticmethod
    def _finish(
        message: intervention_service_pb2.GenerateResponse, chunks: Sequence[results.GeneratedChunk]
    ) -> results.GenerationResult:
        finish = message.finish
        return results.GenerationResult(
            text="".join(chunk.text for chunk in chunks),
            token_ids=np.concatenate([np.zeros(0, np.uint32), *(chunk.token_ids for chunk in chunks)]),
            logprobs=np.concatenate([np.zeros(0, np.float32), *(chunk.logprobs for chunk in chunks)]),
            finish_reason=_FINISH_REASONS.get(finish.reason, "unknown"),
            stop=finish.stop,
            prompt_tokens=finish.prompt_tokens,
            generated_tokens=finish.generated_tokens,
            truncated_tokens=finish.truncated_tokens,
            seed=finish.seed,
            request_id=message.request_id,
            timing=read_timing(finish.timing),
            top=tuple(top for chunk in chunks for top in chunk.top),
            features=tuple(features for chunk in chunks for features in chunk.features),
            sample=message.sample,
            unedited=message.unedited,
        )


def _read_top_tokens(message: intervention_service_pb2.TopTokens) -> results.TopTokens:
    return results.TopTokens(
        token_ids=np.array(message.token_ids, np.uint32),
        logprobs=np.array(message.logprobs, np.float32),
        pieces=tuple(message.pieces),
    )


def _read_token_features(message: intervention_service_pb2.TokenFeatures) -> results.TokenFeatures:
    return results.TokenFeatures(
        first_position=message.first_position,
        token_ids=np.array(message.token_ids, np.uint32),
        pieces=tuple(message.pieces),
        dictionaries={entry.dictionary: read_sparse_rows(entry.features) for entry in message.dictionaries},
    )
