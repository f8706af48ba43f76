"""Handles work that fails on the device: runs it again in smaller batches, or ends the replica."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from service.engine.errors import DeviceLost

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_isolated(
    run: Callable[[Sequence[Item]], Sequence[Result | Exception]], items: Sequence[Item]
) -> list[Result | Exception]:
    """Runs items together and returns one result or exception an item.

    Items that fail together run again in halves. So only the culprit fails, and a batch that was too large for the
    memory runs as two. A failed run releases its tensors before the next run.

    Raises:
        DeviceLost: nothing will run on the device any more.
    """
    outcome = _attempt(run, items)
    if not isinstance(outcome, Exception):
        return [*outcome]
    is_out_of_memory = isinstance(outcome, torch.OutOfMemoryError)
    release_tensors(outcome)
    if len(items) == 1:
        return [outcome]
    del outcome
    if is_out_of_memory and torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    half = len(items) // 2
    return run_isolated(run, items[:half]) + run_isolated(run, items[half:])


def _attempt(
    run: Callable[[Sequence[Item]], Sequence[Result | Exception]], items: Sequence[Item]
) -> Sequence[Result | Exception] | Exception:
    try:
        return run(items)
    except Exception as error:
        raise_if_lost(error)
        return error


def raise_if_lost(error: BaseException) -> None:
    """Raises DeviceLost if the error means that the device is unusable.

    After an illegal access or a hardware fault every later operation fails as well. Out of memory is no such error.
    """
    if isinstance(error, torch.AcceleratorError):
        raise DeviceLost(f"the device does not work any more: {error}") from error


def release_tensors(error: BaseException) -> None:
    """Clears the local variables of the error's traceback, which frees their memory. Its lines stay for the log."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
