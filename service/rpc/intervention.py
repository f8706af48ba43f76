"""InterventionService: generation with features edited."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from service.engine.errors import NonFiniteActivations
from service.engine.work import GeneratedTokens, GenerateWork, GenerationEnd, SamplingOptions, WatchedFeatures
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import intervention_service_pb2 as pb
from service.rpc.call import Call
from service.rpc.checks import Violations, check_dictionary_names
from service.rpc.edits import EditReader
from service.rpc.errors import Violation, invalid_argument
from service.rpc.generated_chunk import pack_chunk
from service.rpc.limits import Limits
from service.rpc.served import ServedModel
from service.rpc.text_inputs import TextInputReader, TokenRow

if TYPE_CHECKING:
    from service.engine.engine import Engine

MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 100.0
DEFAULT_TOP_K = 5
"""Features of each token and dictionary, where the request does not say."""

_FINISH_REASONS = {
    "length": pb.FINISH_REASON_LENGTH,
    "stop": pb.FINISH_REASON_STOP,
    "end_of_text": pb.FINISH_REASON_END_OF_TEXT,
}


class InterventionRpc:
    """Handlers of InterventionService."""

    def __init__(self, engine: Engine, served: ServedModel, limits: Limits, reader: TextInputReader) -> None:
        self._engine = engine
        self._served = served
        self._limits = limits
        self._reader = reader

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateResponse, None]:
        prompt, work = await self._read_generation(request)
        submitted = time.perf_counter()
        try:
            async with aclosing(self._generation(work)) as events:
                async for event in events:
                    reply = pb.GenerateResponse(
                        request_id=call.request_id, sample=event.sample, unedited=event.unedited
                    )
                    if isinstance(event, GeneratedTokens):
                        reply.chunk.CopyFrom(pack_chunk(event, self._reader))
                    else:
                        reply.finish.CopyFrom(
                            pb.GenerationFinish(
                                reason=_FINISH_REASONS[event.reason],
                                prompt_tokens=event.prompt_tokens,
                                generated_tokens=event.generated_tokens,
                                truncated_tokens=prompt.truncated,
                                seed=work.sampling.seed,
                                stop=event.stop,
                                timing=call.timing(event.timing, submitted),
                            )
                        )
                    yield reply
        except NonFiniteActivations as error:
            raise invalid_argument([Violation("edits", str(error))]) from error

    def _generation(self, work: GenerateWork) -> AsyncGenerator[GeneratedTokens | GenerationEnd, None]:
        # The engine promises an async generator: closing it frees the generation's slot.
        return cast("AsyncGenerator[GeneratedTokens | GenerationEnd, None]", self._engine.generate(work))

    async def _read_generation(self, request: pb.GenerateRequest) -> tuple[TokenRow, GenerateWork]:
        limits, violations = self._limits, Violations()
        sampling = _read_sampling(request.sampling, violations)
        stop = self._read_stop(request, violations)
        samples = self._read_samples(request, violations)
        features = self._read_features(request, violations)
        if request.top_logprobs > limits.max_top_logprobs:
            violations.add(
                "top_logprobs", f"is {request.top_logprobs}, more than max_top_logprobs = {limits.max_top_logprobs}"
            )
        context_length = self._engine.max_sequence_tokens
        edit_reader = EditReader(self._served, limits, self._engine, self._reader, violations)
        edit_reader.read(request.edits, request.presets)
        if request.max_new_tokens > limits.max_new_tokens:
            violations.add(
                "max_new_tokens", f"is {request.max_new_tokens}, more than max_new_tokens = {limits.max_new_tokens}"
            )
        prompt = await self._read_prompt(request, violations)
        max_new_tokens = request.max_new_tokens or min(limits.default_new_tokens, limits.max_new_tokens)
        if prompt is not None:
            room = context_length - len(prompt.ids)
            if request.max_new_tokens > room > 0:
                violations.add(
                    "max_new_tokens",
                    f"is {request.max_new_tokens}, but a prompt of {len(prompt.ids)} tokens leaves room for {room} "
                    f"in the context of {context_length}",
                )
            max_new_tokens = min(max_new_tokens, room)
        if prompt is None:
            violations.raise_if_any()
        assert prompt is not None, "a prompt that cannot be read is a violation"
        if features is not None and not violations:
            self._served.require(features.dictionaries)
        edits = await edit_reader.finish(len(prompt.ids))
        work = GenerateWork(
            prompt=prompt.ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            edits=edits,
            max_relative_change=limits.max_relative_change or math.inf,
            ignore_end_of_text=request.ignore_end_of_text,
            samples=samples,
            compare=request.compare,
            top_logprobs=request.top_logprobs,
            features=features,
        )
        try:
            self._engine.check_fits(work)
        except ValueError as error:
            raise invalid_argument([Violation("max_new_tokens", str(error))]) from error
        return prompt, work

    def _read_samples(self, request: pb.GenerateRequest, violations: Violations) -> int:
        samples, limits = request.samples or 1, self._limits
        slots = self._engine.settings.max_concurrent_generations
        together = samples * (2 if request.compare else 1)
        if samples > limits.max_samples:
            violations.add("samples", f"is {samples}, more than max_samples = {limits.max_samples}")
        elif together > slots:
            field = "samples" if samples > 1 else "compare"
            violations.add(field, f"needs {together} sequences, more than max_concurrent_generations = {slots}")
        return samples

    def _read_features(self, request: pb.GenerateRequest, violations: Violations) -> WatchedFeatures | None:
        if not request.HasField("features"):
            return None
        message, limits = request.features, self._limits
        names, top_k = tuple(message.dictionaries), message.top_k or DEFAULT_TOP_K
        check_dictionary_names(names, limits, violations, "features.dictionaries")
        if top_k > limits.max_selected_features:
            most = f"max_selected_features = {limits.max_selected_features}"
            violations.add("features.top_k", f"is {top_k}, more than {most}")
        return WatchedFeatures(names, top_k, message.prompt)

    async def _read_prompt(self, request: pb.GenerateRequest, violations: Violations) -> TokenRow | None:
        # Truncation makes room for the tokens that are wanted; without it a prompt must leave room for one.
        longest = self._engine.max_sequence_tokens - 1
        if request.overflow == common_pb2.OVERFLOW_TRUNCATE:
            wanted = request.max_new_tokens or min(self._limits.default_new_tokens, self._limits.max_new_tokens)
            longest = max(1, longest + 1 - wanted)
        if not request.HasField("prompt"):
            violations.add("prompt", "is not set")
            return None
        rows = await self._reader.read(
            [request.prompt], ["prompt"], request.overflow, longest, "the context length less one", "start", violations
        )
        return rows[0] if rows else None

    def _read_stop(self, request: pb.GenerateRequest, violations: Violations) -> tuple[str, ...]:
        limits = self._limits
        if len(request.stop) > limits.max_stop_strings:
            most = f"max_stop_strings = {limits.max_stop_strings}"
            violations.add("stop", f"has {len(request.stop)} entries, more than {most}")
            return ()
        if request.stop and not self._reader.has_tokenizer:
            violations.add("stop", "the backbone has no tokenizer")
        for place, text in enumerate(request.stop):
            if not text:
                violations.add(f"stop[{place}]", "is empty")
            elif len(text.encode()) > limits.max_stop_bytes:
                violations.add(f"stop[{place}]", f"has more bytes than max_stop_bytes = {limits.max_stop_bytes}")
        return tuple(request.stop)


def _read_sampling(message: pb.Sampling, violations: Violations) -> SamplingOptions:
    """Without the message the likeliest token is taken: a temperature of 0."""
    temperature, top_p = message.temperature, message.top_p
    if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
        violations.add("sampling.temperature", f"is {temperature}, expected a number in 0..{MAX_TEMPERATURE:g}")
    if not (math.isfinite(top_p) and 0 <= top_p <= 1):
        violations.add("sampling.top_p", f"is {top_p}, expected a number in 0..1")
    penalty = message.repetition_penalty
    if not (math.isfinite(penalty) and 0 <= penalty <= MAX_REPETITION_PENALTY):
        violations.add(
            "sampling.repetition_penalty", f"is {penalty}, expected a number in 0..{MAX_REPETITION_PENALTY:g}"
        )
    seed = message.seed if message.HasField("seed") else secrets.randbits(64)
    return SamplingOptions(
        temperature=temperature, top_k=message.top_k, top_p=top_p, seed=seed, repetition_penalty=penalty or 1.0
    )
