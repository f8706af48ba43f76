"""What fails together runs again in halves, without anything of the failed run in memory."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Sequence

import pytest
import torch

from service.engine.errors import DeviceLost
from service.engine.failures import run_isolated


class Device:
    """Doubles numbers. Fails for batches that hold a bad number, or are too large for its memory."""

    def __init__(self, *bad: int, room: int = 100) -> None:
        self.bad, self.room = bad, room
        self.batches: list[list[int]] = []
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.kept: list[bool] = []
        """Of each run: whether a tensor of a failed run before it was still there."""

    def run(self, items: Sequence[int]) -> list[int]:
        self.kept.append(any(tensor() is not None for tensor in self.tensors))
        self.batches.append(list(items))
        x = torch.tensor(items)
        self.tensors.append(weakref.ref(x))
        if len(items) > self.room:
            raise torch.OutOfMemoryError("no room")
        try:
            return self._double(x)
        except ValueError as error:
            raise RuntimeError("cannot double") from error

    def _double(self, x: torch.Tensor) -> list[int]:
        y = 2 * x
        self.tensors.append(weakref.ref(y))
        if any(item in self.bad for item in x.tolist()):
            raise ValueError("bad")
        return y.tolist()


def test_what_works_runs_once() -> None:
    device = Device()
    assert run_isolated(device.run, [1, 2, 3]) == [2, 4, 6]
    assert device.batches == [[1, 2, 3]]


def test_only_the_culprit_fails() -> None:
    device = Device(3, 7)
    results = run_isolated(device.run, range(1, 9))
    assert [result for result in results if isinstance(result, int)] == [2, 4, 8, 10, 12, 16]
    assert [i for i, result in enumerate(results, 1) if isinstance(result, RuntimeError)] == [3, 7]


def test_a_batch_that_needs_too_much_memory_runs_in_halves() -> None:
    device = Device(room=3)
    assert run_isolated(device.run, [1, 2, 3, 4, 5]) == [2, 4, 6, 8, 10]
    assert device.batches == [[1, 2, 3, 4, 5], [1, 2], [3, 4, 5]]


@pytest.mark.parametrize("device", [Device(room=1), Device(2)], ids=["out of memory", "a bad item"])
def test_tensors_of_a_failed_run_are_gone_when_the_next_one_runs(device: Device) -> None:
    run_isolated(device.run, [1, 2, 3])
    assert len(device.kept) > 1
    assert not any(device.kept)


def test_an_error_that_is_handed_on_holds_no_tensors_but_its_lines() -> None:
    device = Device(1)
    (error,) = run_isolated(device.run, [1])
    assert isinstance(error, RuntimeError)
    assert all(tensor() is None for tensor in device.tensors)
    lines = "".join(traceback.format_exception(error))
    assert "in _double" in lines
    assert "cannot double" in lines


def test_a_lost_device_ends_everything() -> None:
    batches = 0

    def run(items: Sequence[int]) -> list[int]:
        nonlocal batches
        batches += 1
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(DeviceLost, match="illegal memory access"):
        run_isolated(run, [1, 2, 3])
    assert batches == 1
