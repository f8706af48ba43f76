"""Scripts that both clients run: the blocking one and the asyncio one."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from service.client import RetryPolicy

QUICK = RetryPolicy(attempts=3, initial_backoff_s=0.001)
Script = Callable[[Any], Awaitable[Any]]
Run = Callable[..., Any]
"""Runs a script with a client of the given options."""


async def value(result: Any) -> Any:
    """Awaits what the asyncio client returns; what the blocking one returns is there already."""
    return await result if inspect.isawaitable(result) else result


async def items(stream: Any) -> list[Any]:
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)
