"""Generate: continuations of a prompt while features are edited, as a stream."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from service.arrays import dictionary_features_bytes, length_delimited
from service.engine.work import (
    Csr,
    GeneratedTokens,
    GenerateWork,
    GenerationEnd,
    SamplingOptions,
    TokenFeatures,
    WatchedFeatures,
)
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import intervention_service_pb2 as pb
from service.rpc.array_inputs import read_ranking
from service.rpc.call import Call
from service.rpc.checks import Violations
from service.rpc.edits import EditReader
from service.rpc.errors import Violation, invalid_argument, out_of_range
from service.rpc.labels import dictionary_labels
from service.rpc.model import ModelRpc
from service.rpc.text_inputs import TokenRow

MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 100.0
DEFAULT_TOP_K = 5
"""Default number of features of each token and dictionary."""

_FINISH_REASONS = {
    "length": pb.FINISH_REASON_LENGTH,
    "stop": pb.FINISH_REASON_STOP,
    "end_of_text": pb.FINISH_REASON_END_OF_TEXT,
}


class GenerateRpc(ModelRpc):
    """The handler of Generate."""

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateResponse, None]:
        prompt, work = await self._read(request)
        unlabelled = _Unlabelled()
        call.submit()
        # The engine promises an async generator: closing it frees the generation's slots.
        events = cast("AsyncGenerator[GeneratedTokens | GenerationEnd, None]", self.engine.generate(work))
        with out_of_range("edits"):
            async with aclosing(events):
                async for event in events:
                    reply = pb.GenerateResponse(
                        request_id=call.request_id, sample=event.sample, unedited=event.unedited
                    )
                    if isinstance(event, GeneratedTokens):
                        reply.chunk.CopyFrom(self._pack_chunk(event))
                        if request.features.include_labels and (new := unlabelled.take(event)):
                            reply.chunk.labels.extend(await dictionary_labels(self.model, new, include_labels=True))
                    else:
                        reply.finish.CopyFrom(_finish(event, prompt, work.sampling.seed, call))
                    yield reply

    # The request

    async def _read(self, request: pb.GenerateRequest) -> tuple[TokenRow, GenerateWork]:
        limits, violations = self.limits, Violations(self.limits)
        sampling = _read_sampling(request.sampling, violations)
        stop = self._read_stop(request, violations)
        samples = self._read_samples(request, violations)
        features = _read_watched(request, violations)
        violations.check_limit("top_logprobs", request.top_logprobs, "max_top_logprobs")
        edit_reader = EditReader(self, violations)
        edit_reader.read(request.edits, request.presets)
        violations.check_limit("max_new_tokens", request.max_new_tokens, "max_new_tokens")
        prompt = await self._read_prompt(request, violations)
        if prompt is None:
            violations.raise_if_any()
        assert prompt is not None, "a prompt that cannot be read is a violation"
        context = self.engine.max_sequence_tokens
        room = context - len(prompt.ids)
        if request.max_new_tokens > room > 0:
            violations.add(
                "max_new_tokens",
                f"is {request.max_new_tokens}, but a prompt of {len(prompt.ids)} tokens leaves room for {room} "
                f"in the context of {context}",
            )
        if features is not None and not violations:
            self.model.require(features.dictionaries)
            self.model.require_rankable(features.dictionaries, features.rank_by, "features.rank_by")
        work = GenerateWork(
            prompt=prompt.ids,
            max_new_tokens=min(self._max_new_tokens(request), room),
            sampling=sampling,
            stop=stop,
            edits=await edit_reader.finish(len(prompt.ids)),
            max_relative_change=limits.max_relative_change or math.inf,
            ignore_end_of_text=request.ignore_end_of_text,
            samples=samples,
            compare=request.compare,
            top_logprobs=request.top_logprobs,
            features=features,
        )
        try:
            self.engine.check_fits(work)
        except ValueError as error:
            raise invalid_argument([Violation("max_new_tokens", str(error))]) from error
        return prompt, work

    def _max_new_tokens(self, request: pb.GenerateRequest) -> int:
        return request.max_new_tokens or min(self.limits.default_new_tokens, self.limits.max_new_tokens)

    async def _read_prompt(self, request: pb.GenerateRequest, violations: Violations) -> TokenRow | None:
        # Truncation leaves room for all the new tokens. Without it, a prompt must leave room for one.
        longest = self.engine.max_sequence_tokens - 1
        if request.overflow == common_pb2.OVERFLOW_TRUNCATE:
            longest = max(1, longest + 1 - self._max_new_tokens(request))
        return await self.reader.read_one(
            request.prompt if request.HasField("prompt") else None,
            "prompt",
            request.overflow,
            longest,
            "the context length less one",
            "start",
            violations,
        )

    def _read_samples(self, request: pb.GenerateRequest, violations: Violations) -> int:
        samples = request.samples or 1
        slots = self.engine.settings.max_concurrent_generations
        together = samples * (2 if request.compare else 1)
        if violations.check_limit("samples", samples, "max_samples") and together > slots:
            field = "samples" if samples > 1 else "compare"
            violations.add(field, f"needs {together} sequences, more than max_concurrent_generations = {slots}")
        return samples

    def _read_stop(self, request: pb.GenerateRequest, violations: Violations) -> tuple[str, ...]:
        if not violations.check_at_most("stop", len(request.stop), "max_stop_strings"):
            return ()
        if request.stop and not self.reader.has_tokenizer:
            violations.add("stop", "the backbone has no tokenizer")
        most = self.limits.max_stop_bytes
        for place, text in enumerate(request.stop):
            if not text:
                violations.add(f"stop[{place}]", "is empty")
            elif len(text.encode()) > most:
                violations.add(f"stop[{place}]", f"has more bytes than max_stop_bytes = {most}")
        return tuple(request.stop)

    # The replies

    def _pack_chunk(self, tokens: GeneratedTokens) -> pb.GeneratedChunk:
        chunk = pb.GeneratedChunk(text=tokens.text, token_ids=tokens.ids, logprobs=tokens.logprobs)
        for likeliest in tokens.top:
            ids, logprobs = [token for token, _ in likeliest], [logprob for _, logprob in likeliest]
            chunk.top.add(token_ids=ids, logprobs=logprobs, pieces=self.reader.pieces(ids))
        chunk.features.extend(self._pack_features(features) for features in tokens.features)
        return chunk

    def _pack_features(self, tokens: TokenFeatures) -> pb.TokenFeatures:
        # The arrays as wire bytes, see service.arrays; field 4 is `dictionaries`.
        message = pb.TokenFeatures.FromString(
            b"".join(length_delimited(4, self._dictionary_features(name, csr)) for name, csr in tokens.features.items())
        )
        message.first_position = tokens.first_position
        message.token_ids.extend(tokens.ids)
        message.pieces.extend(self.reader.pieces(tokens.ids))
        return message

    def _dictionary_features(self, name: str, csr: Csr) -> bytes:
        fingerprint = self.model.dictionaries[name].fingerprint
        return dictionary_features_bytes(name, csr.row_splits, csr.indices, csr.values, None, fingerprint)


class _Unlabelled:
    """Finds the features of a call whose labels were not sent yet."""

    def __init__(self) -> None:
        self._sent: dict[str, set[int]] = {}

    def take(self, tokens: GeneratedTokens) -> dict[str, set[int]]:
        """The new features of each dictionary, which from now on are not new."""
        new: dict[str, set[int]] = {}
        for name, csr in (item for features in tokens.features for item in features.features.items()):
            sent = self._sent.setdefault(name, set())
            if fresh := set(csr.indices.tolist()) - sent:
                new.setdefault(name, set()).update(fresh)
                sent |= fresh
        return new


def _read_sampling(message: pb.Sampling, violations: Violations) -> SamplingOptions:
    """The sampling of a request; without the message, a temperature of 0 (the likeliest token)."""
    violations.check_range("sampling.temperature", message.temperature, MAX_TEMPERATURE)
    violations.check_range("sampling.top_p", message.top_p, 1)
    violations.check_range("sampling.repetition_penalty", message.repetition_penalty, MAX_REPETITION_PENALTY)
    return SamplingOptions(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed if message.HasField("seed") else secrets.randbits(64),
        repetition_penalty=message.repetition_penalty or 1.0,
    )


def _read_watched(request: pb.GenerateRequest, violations: Violations) -> WatchedFeatures | None:
    if not request.HasField("features"):
        return None
    message = request.features
    top_k = message.top_k or DEFAULT_TOP_K
    violations.check_dictionary_names(message.dictionaries, "features.dictionaries")
    violations.check_limit("features.top_k", top_k, "max_selected_features")
    rank_by = read_ranking(message.rank_by, "features.rank_by", violations)
    return WatchedFeatures(tuple(message.dictionaries), top_k, message.prompt, rank_by)


def _finish(end: GenerationEnd, prompt: TokenRow, seed: int, call: Call) -> pb.GenerationFinish:
    return pb.GenerationFinish(
        reason=_FINISH_REASONS[end.reason],
        prompt_tokens=end.prompt_tokens,
        generated_tokens=end.generated_tokens,
        truncated_tokens=prompt.truncated,
        seed=seed,
        stop=end.stop,
        timing=call.timing(end.timing),
    )
