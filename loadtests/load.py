"""A closed-loop gRPC load: every caller sends its next request when the last is answered. Also times arms."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.pb.saeserve.v1.feature_service_pb2_grpc import FeatureServiceStub

SETTLE_S = 0.1
"""Pause between two arms, so that idle worker threads of the first stop spinning."""
_LOOPBACK = ("127.", "localhost:", "[::1]:")


@dataclass(frozen=True)
class LoadResult:
    """Times and replies of a run of requests."""

    seconds: float
    """From the first request's start to the last reply's end."""
    latencies_s: list[float] = field(repr=False)
    """One a request, in the order of the requests."""
    replies: list[pb.ExtractFeaturesResponse] = field(repr=False)
    """In the order of the requests. repr leaves them out: asyncio.run formats its task's result when it restores
    SIGINT's handler, and with the replies that took longer than the requests."""


async def closed_loop(address: str, requests: Sequence[pb.ExtractFeaturesRequest], concurrency: int) -> LoadResult:
    """Sends all requests over one channel from `concurrency` callers.

    Raises:
        ValueError: the address is not a loopback address.
        grpc.aio.AioRpcError: a call failed.
    """
    if not address.startswith(_LOOPBACK):
        raise ValueError(f"load tests talk to loopback only, not {address}")
    replies: list[pb.ExtractFeaturesResponse] = [pb.ExtractFeaturesResponse()] * len(requests)
    latencies = [0.0] * len(requests)
    pending = iter(range(len(requests)))

    async def caller(stub: FeatureServiceStub) -> None:
        for i in pending:
            started = time.perf_counter()
            replies[i] = await stub.ExtractFeatures(requests[i])  # type: ignore[misc]
            latencies[i] = time.perf_counter() - started

    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        await channel.channel_ready()
        stub = FeatureServiceStub(channel)
        started = time.perf_counter()
        await asyncio.gather(*(caller(stub) for _ in range(concurrency)))
        return LoadResult(time.perf_counter() - started, latencies, replies)


def timed(work: Callable[[], object], settle_s: float = SETTLE_S) -> float:
    """Seconds that `work` takes, after a pause of `settle_s`."""
    time.sleep(settle_s)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
