"""FeatureService: features of texts, and between activations and features."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from typing import Final

from service.arrays import (
    dictionary_features_bytes,
    length_delimited,
    pack_input_statistics,
    pack_sparse_rows,
    pack_tensor,
    varint_field,
)
from service.engine.errors import QueueFull
from service.engine.work import ActivationsWork, Aggregation, DecodeWork, EncodeWork, ExtractResult, ExtractWork
from service.pb.saeserve.v1 import common_pb2
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.rpc.array_inputs import read_activations, read_input_statistics, read_selection, read_sparse_rows
from service.rpc.call import Call, Undecodable, cancelled_together
from service.rpc.checks import Violations
from service.rpc.errors import Violation, invalid_argument, out_of_range, shown
from service.rpc.model import ModelRpc
from service.rpc.text_inputs import TokenRow

STREAM_WINDOW: Final = 16
"""Requests of one ExtractFeaturesStream handled at once; further ones wait in the connection."""

_AGGREGATIONS: dict[int, Aggregation] = {
    pb.AGGREGATION_UNSPECIFIED: "none",
    pb.AGGREGATION_NONE: "none",
    pb.AGGREGATION_MAX: "max",
    pb.AGGREGATION_MEAN: "mean",
    pb.AGGREGATION_SUM: "sum",
    pb.AGGREGATION_LAST: "last",
}


class FeatureRpc(ModelRpc):
    """Handlers of FeatureService."""

    async def ExtractFeatures(self, request: pb.ExtractFeaturesRequest, call: Call) -> pb.ExtractFeaturesResponse:
        rows, work = await self._read_extraction(request)
        call.submit()
        result = await self.engine.extract(work)
        return self._pack_extraction(request, rows, result, call)

    async def _read_extraction(self, request: pb.ExtractFeaturesRequest) -> tuple[list[TokenRow], ExtractWork]:
        violations = Violations(self.limits)
        violations.check_dictionary_names(request.dictionaries)
        known = self.model.dictionaries
        dictionaries = {name: known[name] for name in request.dictionaries if name in known}
        selection = read_selection(
            request.selection if request.HasField("selection") else None, dictionaries, self.limits, violations
        )
        violations.check_enum("aggregation", request.aggregation, _AGGREGATIONS)
        self.reader.check_include_tokens(request.include_tokens, violations)
        rows = await self.reader.read_inputs(request.inputs, request.overflow, violations)
        if request.include_reconstruction_error:
            for place, name in enumerate(request.dictionaries):
                if name in dictionaries and dictionaries[name].transcoder:
                    reason = "decodes to another activation than it reads: it has no reconstruction error"
                    violations.add(f"dictionaries[{place}]", reason)
        violations.raise_if_any()
        self.model.require(request.dictionaries)
        self.model.require_rankable(request.dictionaries, selection.rank_by, "selection.rank_by")
        work = ExtractWork(
            rows=tuple(row.ids for row in rows),
            dictionaries=tuple(request.dictionaries),
            selection=selection,
            aggregation=_AGGREGATIONS[request.aggregation],
            reconstruction_error=request.include_reconstruction_error,
        )
        return rows, work

    def _pack_extraction(
        self, request: pb.ExtractFeaturesRequest, rows: list[TokenRow], result: ExtractResult, call: Call
    ) -> pb.ExtractFeaturesResponse:
        # Written as wire bytes from the arrays up and parsed once: 15 us for 60 tokens x 32 features, 290 us by fields.
        reply_fields = [length_delimited(1, call.request_id.encode())]
        for row, dictionaries in zip(rows, result.inputs, strict=True):
            row_fields = []
            if request.include_tokens:
                row_fields.append(length_delimited(1, self.reader.tokens(row).SerializeToString()))
            row_fields += [varint_field(2, len(row.ids)), varint_field(3, row.truncated)]
            for entry in dictionaries:
                csr = entry.features
                row_fields.append(
                    length_delimited(
                        4,
                        dictionary_features_bytes(
                            entry.dictionary, csr.row_splits, csr.indices, csr.values, entry.reconstruction_error
                        ),
                    )
                )
            reply_fields.append(length_delimited(2, *row_fields))
        reply = pb.ExtractFeaturesResponse.FromString(b"".join(reply_fields))
        reply.timing.CopyFrom(call.timing(result.timing))
        return reply

    async def ExtractFeaturesStream(
        self, requests: AsyncIterable[pb.ExtractFeaturesStreamRequest], call: Call
    ) -> AsyncGenerator[pb.ExtractFeaturesStreamResponse, None]:
        # The window bounds what one stream has in the works: a slot is taken before the next request is read and given
        # back when its reply has gone out.
        slots = asyncio.Semaphore(STREAM_WINDOW)
        replies: asyncio.Queue[asyncio.Task[pb.ExtractFeaturesResponse] | None] = asyncio.Queue()
        running: set[asyncio.Task[pb.ExtractFeaturesResponse]] = set()
        calls: dict[asyncio.Task[pb.ExtractFeaturesResponse], Call] = {}

        async def read() -> None:
            try:
                iterator = aiter(requests)
                while True:
                    await slots.acquire()
                    try:
                        message = await anext(iterator)
                    except StopAsyncIteration:
                        return
                    inner = Call()
                    task = asyncio.ensure_future(self._extract_streamed(message, inner))
                    running.add(task)
                    calls[task] = inner
                    replies.put_nowait(task)
            finally:
                replies.put_nowait(None)

        reading = asyncio.ensure_future(read())
        try:
            while (task := await replies.get()) is not None:
                inner = calls.pop(task)
                call.request_id = inner.request_id
                try:
                    response = await task
                finally:
                    # An error ends the stream and names its request.
                    call.request_id = inner.request_id
                    running.discard(task)
                yield pb.ExtractFeaturesStreamResponse(response=response)
                slots.release()
            await reading
        finally:
            await cancelled_together([reading, *running])

    async def _extract_streamed(
        self, message: pb.ExtractFeaturesStreamRequest | Undecodable, call: Call
    ) -> pb.ExtractFeaturesResponse:
        if isinstance(message, Undecodable):
            raise message.error()
        call.identify(message.request)
        if not message.HasField("request"):
            raise invalid_argument([Violation("request", "is not set")])
        while True:
            try:
                return await self.ExtractFeatures(message.request, call)
            except QueueFull as full:
                # A stream waits where a single call is refused: its window already bounds what it asks for.
                await asyncio.sleep(full.retry_after_s)

    async def GetActivations(self, request: pb.GetActivationsRequest, call: Call) -> pb.GetActivationsResponse:
        violations = Violations(self.limits)
        self._check_sites(request.sites, violations)
        violations.check_enum("dtype", request.dtype, common_pb2.DataType.values())
        self.reader.check_include_tokens(request.include_tokens, violations)
        rows = await self.reader.read_inputs(request.inputs, request.overflow, violations)
        n_rows = sum(len(row.ids) for row in rows) * len(request.sites)
        violations.check_limit("inputs", n_rows, "max_activation_rows", "have {} tokens, those of every site counted")
        violations.raise_if_any()
        call.submit()
        work = ActivationsWork(tuple(row.ids for row in rows), tuple(request.sites))
        with out_of_range("inputs"):
            result = await self.engine.activations(work)
        reply = pb.GetActivationsResponse(request_id=call.request_id, timing=call.timing(result.timing))
        for row, activations in zip(rows, result.inputs, strict=True):
            entry = reply.results.add(n_tokens=len(row.ids), truncated_tokens=row.truncated)
            if request.include_tokens:
                entry.tokens.CopyFrom(self.reader.tokens(row))
            for site, x in zip(request.sites, activations, strict=True):
                entry.sites.add(site=site, activations=pack_tensor(x, request.dtype or common_pb2.DATA_TYPE_FLOAT32))
        return reply

    def _check_sites(self, sites: Sequence[str], violations: Violations) -> None:
        if not violations.check_count("sites", len(sites), "max_dictionaries"):
            return
        for place, site in enumerate(sites):
            try:
                self.model.backbone.check_site(site)
            except ValueError as error:
                violations.add(f"sites[{place}]", str(error))
        violations.check_distinct("sites", sites, shown)

    async def EncodeActivations(self, request: pb.EncodeActivationsRequest, call: Call) -> pb.EncodeActivationsResponse:
        violations = Violations(self.limits)
        violations.check_dictionary_name(request.dictionary, "dictionary")
        dictionary = self.model.dictionaries.get(request.dictionary)
        selection = read_selection(
            request.selection if request.HasField("selection") else None,
            {} if dictionary is None else {request.dictionary: dictionary},
            self.limits,
            violations,
        )
        x = read_activations(request.activations, dictionary, violations)
        violations.raise_if_any()
        self.model.require([request.dictionary])
        self.model.require_rankable([request.dictionary], selection.rank_by, "selection.rank_by")
        call.submit()
        with out_of_range("activations"):
            result = await self.engine.encode(EncodeWork(request.dictionary, x, selection))
        csr = result.features
        reply = pb.EncodeActivationsResponse(
            request_id=call.request_id, features=pack_sparse_rows(csr.row_splits, csr.indices, csr.values)
        )
        if result.mean is not None and result.std is not None:
            reply.input_statistics.CopyFrom(pack_input_statistics(result.mean, result.std))
        reply.timing.CopyFrom(call.timing(result.timing))
        return reply

    async def DecodeFeatures(self, request: pb.DecodeFeaturesRequest, call: Call) -> pb.DecodeFeaturesResponse:
        violations = Violations(self.limits)
        violations.check_dictionary_name(request.dictionary, "dictionary")
        dictionary = self.model.dictionaries.get(request.dictionary)
        if dictionary is not None and dictionary.skip is not None:
            violations.add("dictionary", "has a skip connection: decoding it needs the encoder's input as well")
        features = read_sparse_rows(request.features, dictionary, self.limits, violations)
        mean, std = read_input_statistics(
            request.input_statistics if request.HasField("input_statistics") else None,
            max(0, len(request.features.row_splits) - 1),
            dictionary,
            violations,
        )
        violations.raise_if_any()
        self.model.require([request.dictionary])
        call.submit()
        with out_of_range("features.values"):
            result = await self.engine.decode(DecodeWork(request.dictionary, features, mean, std))
        return pb.DecodeFeaturesResponse(
            request_id=call.request_id, activations=pack_tensor(result.x), timing=call.timing(result.timing)
        )
