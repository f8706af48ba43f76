"""The client for asyncio code.

protos/generate_sync.py writes sync.py, the client for ordinary code, from this file: run `make proto` after a change.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sae_runtime.catalogue.records import Label, Neighbor
from service.client import catalog, features, measurements, messages, replies, results
from service.client import channel as channels
from service.client.edits import Edit
from service.client.errors import DeadlineExceeded, NotFound, SaeserveError, Unavailable, error_of_call
from service.client.generation import GenerationReader
from service.client.options import (
    AblateOptions,
    ActivationOptions,
    AttributeOptions,
    ContrastOptions,
    ExtractOptions,
    GenerateOptions,
    Input,
    Inputs,
    ListOptions,
    ScoreOptions,
    SearchOptions,
    SelectionOptions,
)
from service.client.retry import Attempts, RetryPolicy
from service.feature_messages import read_label, read_neighbor
from service.pb.saeserve.v1 import (
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    catalogue_pb2,
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
            indices, values = reply[0]["resid-mid"].row(3)  # features of the fourth token

    Calls raise SaeserveError or a subclass. UNAVAILABLE is retried as `retry` says, within the call's timeout: a
    generation only until its first message has arrived, extract_features_stream never.

    A task that is cancelled cancels its call.
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
        """Connects on the first call.

        Args:
            address: host:port of the gRPC server.
            timeout_s: deadline of calls with one reply, for all attempts and waits together; math.inf for none.
            generate_timeout_s: the same for generate, ablate_features, attribute_features and contrast_features.
            retry: when failed calls are retried; RetryPolicy() if not given.
            credentials: for TLS, such as grpc.ssl_channel_credentials(); cleartext if not given.
            metadata: sent with every call, such as [("authorization", "Bearer ...")].
            options: gRPC channel options, which override the client's.
        """
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
        """Ends running calls and closes the connection."""
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
        """Runs texts through the backbone and returns the features that fire on them.

        Args:
            inputs: one text, several texts, the token ids of one text, or a list of those.
            dictionaries: names; all loaded ones if not given (the server is asked once).
            timeout_s: the client's default if not given.
            **options: see ExtractOptions.
        """
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
        """extract_features over a stream: each element of `requests` is one call's inputs; replies keep their order.

        Many requests run at once, so this is the fast way through much text. `requests` is read in this event loop and
        may be asynchronous itself. An exception that it raises ends the stream, after the replies to earlier requests.

        Args:
            requests: each element as `inputs` of extract_features.
            dictionaries: names; all loaded ones if not given.
            timeout_s: deadline of the whole stream; none if not given.
            **options: see ExtractOptions.
        """
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

    async def get_activations(
        self,
        inputs: Inputs,
        sites: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        **options: Unpack[ActivationOptions],
    ) -> results.Activations:
        """The backbone's activations on texts or token ids, at sites such as "2.resid_post_mlp".

        reply = await client.get_activations("The cat sat.", "2.resid_post_mlp")
        reply[0]["2.resid_post_mlp"]  # [n_tokens, width]
        """
        names = [sites] if isinstance(sites, str) else sites
        request = messages.get_activations_request(inputs, names, **options)
        return replies.read_activations(await self._unary(self._features.GetActivations, request, timeout_s))

    async def encode_activations(
        self,
        dictionary: str,
        activations: Any,
        *,
        timeout_s: float | None = None,
        **options: Unpack[SelectionOptions],
    ) -> results.Encoding:
        """Encodes activations [n, d_in] (anything numpy can read; sent as float16 if it is float16, else float32)."""
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
        """Decodes features to activations [n, d_in].

        For a dictionary that normalises its input, give the `input_statistics` of encode_activations: without them the
        reconstruction stays in the normalised space.
        """
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
        """Continues a prompt while features are edited.

            generation = client.generate("Once upon a time", [set_feature("resid-mid", 123, 4.0)])
            async for chunk in generation:
                print(chunk.text, end="", flush=True)
            (await generation.result()).finish_reason

        The call starts at once.

        Args:
            prompt: a text or token ids.
            edits: made by set_feature, add_to_feature and so on (service/client/edits.py), or read from YAML.
            timeout_s: deadline of the whole generation; the client's default if not given.
            **options: see GenerateOptions.
        """
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
    ) -> measurements.Scores:
        """Teacher-forced log-probabilities of texts, unedited and edited.

        Args:
            inputs: one text, several texts, the token ids of one text, or a list of those; at least two tokens each.
            edits: act on every text; without edits there are only unedited scores.
            timeout_s: the client's default if not given.
            **options: see ScoreOptions.
        """
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
    ) -> measurements.AblationStudy:
        """How predictions on texts change when features are ablated, one at a time.

        Args:
            inputs: as `inputs` of score.
            features: (dictionary, feature) pairs, or how many of the features that contribute most to the texts'
                reconstruction.
            dictionaries: where the strongest are chosen from; all loaded ones if not given.
            timeout_s: the client's default for generations if not given.
            **options: see AblateOptions.
        """
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
    ) -> measurements.Attributions:
        """Which features on which tokens drive a logit: activation x gradient, and exact ablation of the largest.

        Args:
            text: a text or token ids.
            dictionaries: names; all loaded ones if not given.
            timeout_s: the client's default for generations if not given.
            **options: see AttributeOptions.
        """
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
    ) -> measurements.Contrast:
        """Which features tell two sets of texts apart, and an edit towards the first.

        Args:
            a: at least two texts (or lists of token ids).
            b: at least two more.
            dictionaries: names; all loaded ones if not given.
            timeout_s: the client's default for generations if not given.
            **options: see ContrastOptions.
        """
        request = messages.contrast_request(a, b, await self._names(dictionaries), **options)
        timeout = channels.timeout_of(timeout_s, self._generate_timeout_s)
        return replies.read_contrast(await self._unary(self._intervention.ContrastFeatures, request, timeout))

    # Catalogue and server

    async def list_dictionaries(
        self, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> tuple[catalog.DictionaryInfo, ...]:
        """The loaded dictionaries, sorted by name."""
        request = catalog_service_pb2.ListDictionariesRequest(request_id=request_id or "")
        return replies.read_dictionaries(await self._unary(self._catalog.ListDictionaries, request, timeout_s))

    async def get_dictionary(
        self, name: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> catalog.DictionaryDetails:
        """A dictionary with its provenance and measured figures."""
        request = catalog_service_pb2.GetDictionaryRequest(request_id=request_id or "", name=name)
        return replies.read_dictionary_details(await self._unary(self._catalog.GetDictionary, request, timeout_s))

    async def list_features(
        self, dictionary: str, *, timeout_s: float | None = None, **options: Unpack[ListOptions]
    ) -> catalog.FeatureList:
        """One page of the features of a dictionary with a catalogue, sorted and filtered.

        Args:
            dictionary: its name.
            timeout_s: the client's default if not given.
            **options: see ListOptions.
        """
        request = features.list_features_request(dictionary, **options)
        return features.read_feature_list(await self._unary(self._catalog.ListFeatures, request, timeout_s))

    async def get_feature(
        self, dictionary: str, feature: int, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> catalog.FeatureDetails:
        """All that the catalogue of a dictionary has about a feature."""
        request = catalogue_pb2.GetFeatureRequest(request_id=request_id or "", dictionary=dictionary, feature=feature)
        return features.read_feature_details(await self._unary(self._catalog.GetFeature, request, timeout_s))

    async def search_features(
        self,
        query: str = "",
        dictionaries: str | Sequence[str] = (),
        *,
        timeout_s: float | None = None,
        **options: Unpack[SearchOptions],
    ) -> catalog.FeatureSearch:
        """Features by words of their labels, tokens and contexts, or by texts that they fire on.

        Args:
            query: words; a symbol, such as "=", means the token that is just this symbol. Empty with `fires_on`.
            dictionaries: names; all loaded ones if not given.
            timeout_s: the client's default if not given.
            **options: see SearchOptions.
        """
        names = [dictionaries] if isinstance(dictionaries, str) else dictionaries
        request = features.search_features_request(query, names, **options)
        return features.read_search(await self._unary(self._catalog.SearchFeatures, request, timeout_s))

    async def neighbor_features(
        self, dictionary: str, feature: int, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> tuple[Neighbor, ...]:
        """The features that lie near one or fire together with it, of this and other dictionaries."""
        request = catalogue_pb2.NeighborFeaturesRequest(
            request_id=request_id or "", dictionary=dictionary, feature=feature
        )
        reply = await self._unary(self._catalog.NeighborFeatures, request, timeout_s)
        return tuple(read_neighbor(message) for message in reply.neighbors)

    async def label_feature(
        self,
        dictionary: str,
        feature: int,
        text: str,
        *,
        source: str = "person",
        author: str = "",
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Label | None:
        """Writes what a feature means, and returns the label of this source that it replaces, if there was one.

        Args:
            dictionary: its name.
            feature: its number.
            text: at most 500 characters on one line; empty: the label is removed.
            source: "person", or the name of the model that wrote it.
            author: who wrote it.
            request_id: returned in errors; the server makes one up if it is not given.
            timeout_s: the client's default if not given.
        """
        request = catalogue_pb2.LabelFeatureRequest(
            request_id=request_id or "",
            dictionary=dictionary,
            feature=feature,
            text=text,
            source=source,
            author=author,
        )
        reply = await self._unary(self._catalog.LabelFeature, request, timeout_s)
        return read_label(reply.replaced) if reply.HasField("replaced") else None

    async def server_info(self, *, request_id: str | None = None, timeout_s: float | None = None) -> catalog.ServerInfo:
        """Versions, the backbone, and the limits that requests must keep to."""
        request = server_service_pb2.GetServerInfoRequest(request_id=request_id or "")
        info = replies.read_server_info(await self._unary(self._server.GetServerInfo, request, timeout_s))
        self._loaded = info.dictionaries
        return info

    async def is_healthy(self, service: str = "", *, timeout_s: float = 5.0) -> bool:
        """Whether the server answers and says that it is serving; with `service`, that this gRPC service is.

        Raises:
            NotFound: the service, such as "saeserve.v1.FeatureService", does not exist.
        """
        try:
            return await self._check(service, timeout_s)
        except (Unavailable, DeadlineExceeded):
            return False

    async def wait_until_ready(self, timeout_s: float = 60.0, service: str = "") -> None:
        """Waits until is_healthy holds.

        Raises:
            DeadlineExceeded: it did not within `timeout_s`; the message has the last state.
        """
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
                return False  # before the application is up, Ray's ingress knows no service, not even ""
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
    """A running generation: iterate over its chunks, then await its result. Leaving `async with` cancels it."""

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
        """The whole first sample, with edits; waits until all sequences have ended."""
        return (await self.all_results())[0]

    async def all_results(self) -> tuple[results.GenerationResult, ...]:
        """Every sequence in full: the edited samples, then the unedited ones; waits until all have ended."""
        async for _ in self:
            pass
        return self._reader.ended

    def cancel(self) -> None:
        """Ends the generation, also in the server. Iterating further raises asyncio.CancelledError."""
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
        async for inputs in requests:
            yield inputs
    else:
        for inputs in requests:
            yield inputs
