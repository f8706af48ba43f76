"""Errors of work that the engine refuses, or that fails."""

from __future__ import annotations

from sae_runtime.errors import UnknownDictionary as UnknownDictionary


class QueueFull(Exception):
    """Too much work waits already. Trying again later can succeed."""

    def __init__(self, message: str, *, limit_name: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.limit_name = limit_name
        """The setting of EngineSettings that was reached."""
        self.retry_after_s = retry_after_s
        """Seconds until the queue should have room, estimated from the current speed."""


class EngineStopped(Exception):
    """The engine is not running: not started yet, stopped or broken."""


class DeviceLost(EngineStopped):
    """The device failed for good. The engine has stopped, and its replica must be replaced."""


class NonFiniteActivations(ValueError):
    """Activations or logits of this request are NaN or infinite: its input or its edits are out of range."""
