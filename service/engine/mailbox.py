"""What a request has been delivered and its reader has not taken yet."""

from __future__ import annotations

import asyncio

from service.engine.continuation import Event
from service.engine.work import GeneratedTokens


class Mailbox:
    """Events of one Generate request, on one event loop: a reader that fell behind gets a sequence's tokens at once."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._filled = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._filled.set()

    async def take(self) -> list[Event]:
        """Waits for events and takes all; tokens that follow one another in a sequence are one event."""
        await self._filled.wait()
        self._filled.clear()
        events, self._events = self._events, []
        if len(events) == 1:
            return events
        joined: list[Event] = []
        last: dict[tuple[int, bool], GeneratedTokens] = {}
        for event in events:
            if isinstance(event, GeneratedTokens):
                earlier = last.get((event.sample, event.unedited))
                if earlier is None:
                    last[event.sample, event.unedited] = event
                    joined.append(event)
                else:
                    earlier.extend(event)
            else:
                joined.append(event)
        return joined
