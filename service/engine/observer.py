"""What the engine tells whoever counts."""

from __future__ import annotations

from typing import Protocol


class EngineObserver(Protocol):
    """Called on the event loop, after the results of a batch have been handed over. `kind` is "extract", "encode",
    "decode", "score", "ablate", "attribute", "resample" or "generate" (where a batch is one generation step)."""

    def batch_done(self, kind: str, items: int, tokens: int, seconds: float) -> None:
        """One batch ran for `seconds`; `items` requests had a part in it."""

    def waited(self, kind: str, seconds: float) -> None:
        """One request waited `seconds` from its arrival to its first batch."""
