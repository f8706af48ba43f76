"""The client for asyncio code: the same calls as service.client.sync."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import catalog, causal, messages, replies, results
from service.client import channel as channels
from service.client.edits import Edit
from service.client.errors import DeadlineExceeded, NotFound, SaeserveError, Unavailable, error_of_call
from service.client.generation import GenerationReader
from service.client.options import (
    AblateOptions,
    AttributeOptions,
    ContrastOptions,
    ExtractOptions,
    GenerateOptions,
    Input,
    Inputs,
    ScoreOptions,
    SelectionOptions,
)
from service.client.retry import Attempts, RetryPolicy
from service.pb.saeserve.v1 import (
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    feature_service_pb2,
    feature_service_pb2_grpc,
    intervention_service_pb2,
    intervention_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
)

_END_OF_STREAM = cast(Any, grpc.aio).EOF  # missing in grpc-stubs


class AsyncClient:
    """Calls a saeserve server from asyncio code. Make it inside a coroutine; close it, or use it in `async with`.

        async with AsyncClient() as client:
            reply = await client.extract_features("The cat sat on the mat.", top_k=5)
            async for chunk in client.generate("Once upon a time"):
                print(chunk.text, end="")

    Arguments, results, errors and retries are those of Client. A task that is cancelled cancels its call.
    """

    def __init__(
        self,
        address: str = channels.DEFAULT_ADDRESS,
        *,
        timeout_s: float = channels.TIMEOUT_S,
        generate_timeout_s: float = channels.GENERATE_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: channels.Metadata = (),
        options: channels.ChannelOptions = (),
    ) -> None:
        """As Client."""
        self.address = address
        self._timeout_s = timeout_s
        self._generate_timeout_s = generate_timeout_s
        self._retry = retry or RetryPolicy()
        self._metadata = tuple(metadata)
        channel_options = channels.channel_options(address, options)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, channel_options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, channel_options)
        # The stubs work on both kinds of channels; their types know only one at a time.
        self._features: Any = feature_service_pb2_grpc.FeatureServiceStub(self._channel)
        self._intervention: Any = intervention_service_pb2_grpc.InterventionServiceStub(self._channel)
        self._catalog: Any = catalog_service_pb2_grpc.CatalogServiceStub(self._channel)
        self._server: Any = server_service_pb2_grpc.ServerServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._loaded: tuple[str, ...] | None = None

    async def close(self) -> None:
        """Ends calls that are under way and closes the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # Features

    async def extract_features(
        self,
        inputs: Inputs,
        dictionaries: str | Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[ExtractOptions],
    ) -> results.Extraction:
        """As Client.extract_features."""
        request = messages.extract_features_request(inputs, await self._names(dictionaries), **options)
        return replies.read_extraction(await self._unary(self._features.ExtractFeatures, request, timeout_s))

    async def extract_features_stream(
        self,
        requests: Iterable[Inputs] | AsyncIterable[Inputs],
        dictionaries: str | Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[ExtractOptions],
    ) -> AsyncIterator[results.Extraction]:
        """As Client.extract_features_stream; `requests` is read in this event loop and may be asynchronous itself."""
        names = await self._names(dictionaries)
        failures: list[Exception] = []

        async def stream_requests() -> AsyncIterator[feature_service_pb2.ExtractFeaturesStreamRequest]:
            try:
                async for inputs in _asynchronous(requests):
                    request = messages.extract_features_request(inputs, names, **options)
                    yield feature_service_pb2.ExtractFeaturesStreamRequest(request=request)
            except Exception as failure:  # grpc would log it and cancel the call
                failures.append(failure)

        call: Any = self._features.ExtractFeaturesStream(
            stream_requests(), timeout=timeout_s and channels.grpc_timeout(timeout_s), metadata=self._metadata
        )
        try:
            async for reply in call:
                yield replies.read_extraction(reply.response)
        except grpc.RpcError as failure:
            raise error_of_call(failure) from failure
        finally:
            call.cancel()
        if failures:
            raise failures[0]

    async def encode_activations(
        self,
        dictionary: str,
        activations: Any,
        *,
        timeout_s: float | None = None,
        **options: Unpack[SelectionOptions],
    ) -> results.Encoding:
        """As Client.encode_activations."""
        request = messages.encode_activations_request(dictionary, activations, **options)
        return replies.read_encoding(await self._unary(self._features.EncodeActivations, request, timeout_s))

    async def decode_features(
        self,
        dictionary: str,
        features: results.SparseRows,
        input_statistics: results.InputStatistics | None = None,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> results.Decoding:
        """As Client.decode_features."""
        request = messages.decode_features_request(dictionary, features, input_statistics, request_id=request_id)
        return replies.read_decoding(await self._unary(self._features.DecodeFeatures, request, timeout_s))

    # Interventions

    def generate(
        self,
        prompt: Input,
        edits: Iterable[Edit] = (),
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGeneration:
        """As Client.generate; the call starts at once."""
        request = messages.generate_request(prompt, edits, **options)
        timeout = channels.timeout_of(timeout_s, self._generate_timeout_s)

        def open_call(remaining_s: float | None) -> Any:
            return self._intervention.Generate(request, timeout=remaining_s, metadata=self._metadata)

        return AsyncGeneration(open_call, Attempts(self._retry, timeout), GenerationReader(request))

    async def score(
        self,
        inputs: Inputs,
        edits: Iterable[Edit] = (),
        *,
        timeout_s: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> causal.Scores:
        """As Client.score."""
        request = messages.score_request(inputs, edits, **options)
        return replies.read_scores(await self._unary(self._intervention.Score, request, timeout_s))

    async def ablate_features(
        self,
        inputs: Inputs,
        features: Iterable[tuple[str, int]] | int = 10,
        dictionaries: str | Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[AblateOptions],
    ) -> causal.AblationStudy:
        """As Client.ablate_features."""
        names = await self._names(dictionaries) if isinstance(features, int) else ()
        request = messages.ablate_request(inputs, features, names, **options)
        timeout = channels.timeout_of(timeout_s, self._generate_timeout_s)
        return replies.read_ablation(await self._unary(self._intervention.AblateFeatures, request, timeout))

    async def attribute_features(
        self,
        text: Input,
        dictionaries: str | Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[AttributeOptions],
    ) -> causal.Attributions:
        """As Client.attribute_features."""
        request = messages.attribute_request(text, await self._names(dictionaries), **options)
        timeout = channels.timeout_of(timeout_s, self._generate_timeout_s)
        return replies.read_attributions(await self._unary(self._intervention.AttributeFeatures, request, timeout))

    async def contrast_features(
        self,
        a: Sequence[Input],
        b: Sequence[Input],
        dictionaries: str | Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[ContrastOptions],
    ) -> causal.Contrast:
        """As Client.contrast_features."""
        request = messages.contrast_request(a, b, await self._names(dictionaries), **options)
        timeout = channels.timeout_of(timeout_s, self._generate_timeout_s)
        return replies.read_contrast(await self._unary(self._intervention.ContrastFeatures, request, timeout))

    # Catalogue and server

    async def list_dictionaries(
        self, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> tuple[catalog.DictionaryInfo, ...]:
        """As Client.list_dictionaries."""
        request = catalog_service_pb2.ListDictionariesRequest(request_id=request_id or "")
        return replies.read_dictionaries(await self._unary(self._catalog.ListDictionaries, request, timeout_s))

    async def get_dictionary(
        self, name: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> catalog.DictionaryDetails:
        """As Client.get_dictionary."""
        request = catalog_service_pb2.GetDictionaryRequest(request_id=request_id or "", name=name)
        return replies.read_dictionary_details(await self._unary(self._catalog.GetDictionary, request, timeout_s))

    async def server_info(self, *, request_id: str | None = None, timeout_s: float | None = None) -> catalog.ServerInfo:
        """As Client.server_info."""
        request = server_service_pb2.GetServerInfoRequest(request_id=request_id or "")
        info = replies.read_server_info(await self._unary(self._server.GetServerInfo, request, timeout_s))
        self._loaded = info.dictionaries
        return info

    async def is_healthy(self, service: str = "", *, timeout_s: float = 5.0) -> bool:
        """As Client.is_healthy."""
        try:
            return await self._check(service, timeout_s)
        except (Unavailable, DeadlineExceeded):
            return False

    async def wait_until_ready(self, timeout_s: float = 60.0, service: str = "") -> None:
        """As Client.wait_until_ready."""
        deadline = time.monotonic() + timeout_s
        while True:
            last_error: SaeserveError | None = None
            try:
                if await self._check(service, max(0.1, min(5.0, deadline - time.monotonic()))):
                    return
            except (Unavailable, DeadlineExceeded) as error:
                last_error = error
            if time.monotonic() + channels.READINESS_POLL_S >= deadline:
                raise channels.not_ready(self.address, timeout_s, last_error)
            await asyncio.sleep(channels.READINESS_POLL_S)

    # Calls

    async def _check(self, service: str, timeout_s: float) -> bool:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            reply = await self._health.Check(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as failure:
            error = error_of_call(failure)
            if isinstance(error, NotFound) and not service:
                return False  # the server as a whole is unknown only to Ray's ingress, before the application is up
            raise error from failure
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def _names(self, dictionaries: str | Sequence[str] | None) -> Sequence[str]:
        if dictionaries is None:
            return self._loaded if self._loaded is not None else (await self.server_info()).dictionaries
        return [dictionaries] if isinstance(dictionaries, str) else dictionaries

    async def _unary(self, rpc: Callable[..., Any], request: object, timeout_s: float | None) -> Any:
        attempts = Attempts(self._retry, channels.timeout_of(timeout_s, self._timeout_s))
        while True:
            try:
                return await rpc(request, timeout=attempts.remaining_s(), metadata=self._metadata)
            except grpc.RpcError as failure:
                error = error_of_call(failure)
                delay = attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            await asyncio.sleep(delay)


class AsyncGeneration(AsyncIterator[results.GeneratedChunk]):
    """A generation under way: iterate over its chunks, then await its result. Leaving `async with` cancels it."""

    def __init__(self, open_call: Callable[[float | None], Any], attempts: Attempts, reader: GenerationReader) -> None:
        self._open_call = open_call
        self._attempts = attempts
        self._reader = reader
        self._started = False
        self._call = open_call(attempts.remaining_s())

    async def __anext__(self) -> results.GeneratedChunk:
        while True:
            message = await self._receive()
            if message is None:
                if not self._reader.complete:
                    raise channels.ended_early()
                raise StopAsyncIteration
            chunk = self._reader.read(message)
            if chunk is not None:
                return chunk

    async def result(self) -> results.GenerationResult:
        """All of the first sample, edited; waits for the end of all."""
        return (await self.all_results())[0]

    async def all_results(self) -> tuple[results.GenerationResult, ...]:
        """All of every sequence: the edited samples, then the unedited ones; waits for their end."""
        async for _ in self:
            pass
        return self._reader.ended

    def cancel(self) -> None:
        """Ends the generation in the server as well; iterating on raises asyncio.CancelledError."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    async def _receive(self) -> intervention_service_pb2.GenerateResponse | None:
        """The next message, or None at the end of the stream."""
        while True:
            try:
                message = await self._call.read()
            except grpc.RpcError as failure:
                error = error_of_call(failure)
                delay = None if self._started else self._attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            else:
                self._started = True
                return None if message is _END_OF_STREAM else message
            await asyncio.sleep(delay)
            self._call = self._open_call(self._attempts.remaining_s())


async def _asynchronous(
    requests: Iterable[Inputs] | AsyncIterable[Inputs],
) -> AsyncIterator[Inputs]:
    if isinstance(requests, AsyncIterable):
        async for each in requests:
            yield each
    else:
        for each in requests:
            yield each
