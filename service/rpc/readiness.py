"""Whether a replica takes calls; health checks and the wrapper around every handler read it."""

from __future__ import annotations

import asyncio
from typing import Literal

State = Literal["starting", "serving", "draining"]


class Readiness:
    """A state that can be waited on. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._state: State = "starting"
        self._changed = asyncio.Event()

    @property
    def state(self) -> State:
        return self._state

    @property
    def serving(self) -> bool:
        return self._state == "serving"

    def set(self, state: State) -> None:
        """Changes the state and wakes those who wait."""
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_beyond(self, state: State) -> State:
        """Returns the state once it is not `state`."""
        while self._state == state:
            await self._changed.wait()
        return self._state
