"""The one wrapper around every handler: request ids, admission, timing, errors, metrics, cancellation.

A handler is written as `async def Method(self, request, call) -> reply` (streams: an async generator) and raises what
it likes; wrapped, it is `(request, context) -> reply` for Ray Serve or grpc.aio, and raises nothing but CancelledError.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import grpc
from google.protobuf.message import DecodeError, Message

from service.engine.work import WorkTiming
from service.pb.saeserve.v1 import common_pb2
from service.rpc.errors import GrpcContext, RpcError, Violation, as_rpc_error, invalid_argument, set_error, unavailable

if TYPE_CHECKING:
    from service.metrics import Metrics

MAX_REQUEST_ID_CHARACTERS = 128

UnaryMethod = Callable[[Any, "Call"], Awaitable[Message]]
StreamMethod = Callable[[Any, "Call"], AsyncGenerator[Message, None]]
UnaryHandler = Callable[[Any, GrpcContext], Awaitable[Message]]
StreamHandler = Callable[[Any, GrpcContext], AsyncIterator[Message]]


@dataclass(frozen=True)
class Undecodable:
    """Stands for a request whose bytes are not a message of its type, such as text that is not UTF-8."""

    message_type: str
    reason: str

    def error(self) -> RpcError:
        return invalid_argument([Violation("", f"the request cannot be parsed as {self.message_type}: {self.reason}")])


def tolerant_deserializer(message_class: type[Message]) -> Callable[[bytes], Message | Undecodable]:
    """Parses requests. Without it, grpc would answer INTERNAL to bytes that cannot be parsed."""

    def deserialize(data: bytes) -> Message | Undecodable:
        try:
            return message_class.FromString(data)
        except (DecodeError, UnicodeDecodeError) as error:
            return Undecodable(message_class.DESCRIPTOR.full_name, str(error))

    return deserialize


class Call:
    """One call, as its handler sees it."""

    def __init__(self) -> None:
        self.arrived = time.perf_counter()
        self._submitted = self.arrived
        self.request_id = uuid.uuid4().hex
        """The client's id, once `identify` has read it."""

    def identify(self, request: Message | Undecodable) -> None:
        """Takes over the request's id.

        Raises:
            RpcError: INVALID_ARGUMENT for an id that is too long or not printable, or a request that cannot be parsed.
        """
        if isinstance(request, Undecodable):
            raise request.error()
        request_id: str = getattr(request, "request_id", "")
        if not request_id:
            return
        # ASCII, since it is echoed in HTTP/2 headers.
        if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not (request_id.isascii() and request_id.isprintable()):
            raise invalid_argument(
                [Violation("request_id", f"must be at most {MAX_REQUEST_ID_CHARACTERS} printable ASCII characters")]
            )
        self.request_id = request_id

    def submit(self) -> None:
        """Marks that the request has been read; to be called before the engine gets its work."""
        self._submitted = time.perf_counter()

    def timing(self, work: WorkTiming) -> common_pb2.Timing:
        """The timing of a reply: the engine's time, and the time before the engine had the work."""
        now = time.perf_counter()
        return common_pb2.Timing(
            queue_ms=1000 * (self._submitted - self.arrived + work.queue_s),
            compute_ms=1000 * work.compute_s,
            total_ms=1000 * (now - self.arrived),
        )


State = Literal["starting", "serving", "draining"]


class Readiness:
    """Whether a replica takes calls, as a state to wait on, and how many run. Use all methods from one event loop."""

    def __init__(self) -> None:
        self._state: State = "starting"
        self._changed = asyncio.Event()
        self._running_calls = 0

    @property
    def state(self) -> State:
        return self._state

    @property
    def serving(self) -> bool:
        return self._state == "serving"

    @property
    def drained(self) -> bool:
        """Whether the replica drains and no call runs any more."""
        return self._state == "draining" and self._running_calls == 0

    @contextmanager
    def running_call(self) -> Iterator[None]:
        """Counts a call while a `with` block runs it.

        Raises:
            RpcError: UNAVAILABLE, the replica takes no calls.
        """
        if not self.serving:
            raise self.refusal()
        self._running_calls += 1
        try:
            yield
        finally:
            self._running_calls -= 1

    def refusal(self) -> RpcError:
        return unavailable(f"the server is {self._state}")

    def set(self, state: State) -> None:
        """Changes the state and wakes all waiters."""
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_beyond(self, state: State) -> State:
        """Returns the state once it is not `state`."""
        while self._state == state:
            await self._changed.wait()
        return self._state


class CallWrapper:
    """Wraps methods into handlers. A replica has one for all its RPCs."""

    def __init__(self, readiness: Readiness, metrics: Metrics, note_load: Callable[[], None]) -> None:
        """`note_load` is called as calls end, to keep the load that metrics show fresh."""
        self._readiness = readiness
        self._metrics = metrics
        self._note_load = note_load

    def unary(
        self, name: str, method: UnaryMethod, reply_class: type[Message], *, always: bool = False
    ) -> UnaryHandler:
        """A handler with one reply; `always` answers even while the replica is starting or draining."""

        async def handler(request: Any, context: GrpcContext) -> Message:
            call = Call()
            code = grpc.StatusCode.CANCELLED
            try:
                call.identify(request)
                with self._admitted(always):
                    reply = await method(request, call)
                context.set_trailing_metadata([("request-id", call.request_id)])
                code = grpc.StatusCode.OK
            except Exception as error:
                code = self._fail(context, error, call)
                reply = reply_class()
            finally:  # also on CancelledError, which goes on to whoever cancelled
                self._done(name, code, call)
            return reply

        return handler

    def stream(self, name: str, method: StreamMethod, *, always: bool = False) -> StreamHandler:
        """A handler with a stream of replies; the request is one message, or an async iterable of messages.

        When the replica drains, it reads no further messages: replies to the others go out, then UNAVAILABLE.
        """

        async def handler(request: Any, context: GrpcContext) -> AsyncIterator[Message]:
            call = Call()
            code = grpc.StatusCode.CANCELLED
            try:
                if not isinstance(request, AsyncIterable):
                    call.identify(request)
                async with AsyncExitStack() as stack:
                    stack.enter_context(self._admitted(always))
                    if isinstance(request, AsyncIterable):
                        request = await stack.enter_async_context(aclosing(self._until_drain(request)))
                    async for reply in await stack.enter_async_context(aclosing(method(request, call))):
                        yield reply
                context.set_trailing_metadata([("request-id", call.request_id)])
                code = grpc.StatusCode.OK
            except Exception as error:
                code = self._fail(context, error, call)
            finally:  # also on CancelledError and GeneratorExit
                self._done(name, code, call)

        return handler

    def _admitted(self, always: bool) -> AbstractContextManager[None]:
        return nullcontext() if always else self._readiness.running_call()

    async def _until_drain(self, requests: AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
        """The messages of a stream. A client that keeps an idle stream open would hold up the drain.

        Raises:
            RpcError: UNAVAILABLE, the replica drains.
        """
        iterator = aiter(requests)
        drain: asyncio.Future[Any] = asyncio.ensure_future(self._readiness.wait_beyond("serving"))
        message: asyncio.Future[Any] | None = None
        try:
            while True:
                message = asyncio.ensure_future(anext(iterator))
                await asyncio.wait((message, drain), return_when=asyncio.FIRST_COMPLETED)
                if drain.done():
                    raise self._readiness.refusal()
                try:
                    request = message.result()
                except StopAsyncIteration:
                    return
                yield request
        finally:
            await cancelled_together([task for task in (message, drain) if task is not None])

    def _done(self, name: str, code: grpc.StatusCode, call: Call) -> None:
        self._metrics.call_done(name, code.name, time.perf_counter() - call.arrived)
        self._note_load()

    @staticmethod
    def _fail(context: GrpcContext, error: Exception, call: Call) -> grpc.StatusCode:
        rpc_error: RpcError = as_rpc_error(error, call.request_id)
        set_error(context, rpc_error, call.request_id)
        return rpc_error.code


async def cancelled_together(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancels tasks and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
