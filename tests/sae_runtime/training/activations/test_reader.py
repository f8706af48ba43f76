"""Reading ahead in a thread changes nothing but the time; its errors reach the caller; it stays within its bound."""

import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_runtime import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.training.activations.reader import ThreadedReader
from sae_runtime.training.activations.source import ActivationSource, open_activation_source
from sae_runtime.training.activations.streams import RowStreams
from sae_runtime.training.config import TrainingConfig
from tests.sae_runtime.training.activations.test_source import assert_same, batches, corpus, settings, through_file

__all__ = ["corpus", "settings"]  # fixtures
SITES = [Site.parse("0.resid_pre"), Site.parse("1.resid_post_mlp")]


class Counting:
    """Rows 1, 2, 3 … of one token each, ten an epoch."""

    def __init__(self) -> None:
        self.read = 0

    @property
    def epoch(self) -> int:
        return max(self.read - 1, 0) // 10

    def __next__(self) -> list[int]:
        self.read += 1
        return [self.read % 100]

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: Any) -> None:
        self.read = state["read"]


@pytest.fixture
def sources(settings: dict[str, Any], tiny_backbone: Backbone) -> Iterator[Any]:
    opened: list[ActivationSource] = []

    def make(**extra: Any) -> ActivationSource:
        opened.append(open_activation_source(TrainingConfig(**{**settings, **extra}), tiny_backbone, SITES))
        return opened[-1]

    yield make
    for source in opened:
        source.close()


@pytest.mark.parametrize("extra", [{}, {"rows": "documents"}, {"backbone_tokens": 16}])
def test_the_batches_are_those_without_the_thread(sources: Any, extra: dict[str, Any]) -> None:
    before = threading.active_count()
    ahead = sources(overlap="on", **extra)
    assert_same(batches(ahead, 100), batches(sources(overlap="off", **extra), 100))
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="is closed"):
        batches(ahead, 100)


@pytest.mark.parametrize("taken", [0, 3, 37])
def test_a_position_is_what_the_caller_has_seen(sources: Any, taken: int) -> None:
    expected = batches(sources(overlap="off"), 90)
    first = sources(overlap="on")
    batches(first, taken)
    state = through_file(first.state_dict())
    for overlap in ("on", "off"):
        resumed = sources(overlap=overlap)
        batches(resumed, 11)  # what was read before a state is loaded does not matter
        resumed.load_state_dict(through_file(state))
        assert_same(batches(resumed, 90 - taken), expected[taken:])
    assert_same(batches(first, 90 - taken), expected[taken:])


def test_errors_of_the_thread_reach_the_caller(
    sources: Any, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources(overlap="on")
    forward, calls = tiny_backbone.forward, count()

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(*arguments, **options)

    monkeypatch.setattr(tiny_backbone, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        source.peek(64)


def test_no_text_is_an_error_of_the_caller(sources: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"no text to train on in .*empty\.txt"):
        sources(overlap="on", data=[empty]).next_batch(64)


class Gate:
    """A stand-in for the backbone's pass that lets the test decide when one is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_streams: int, ahead: int) -> None:
        self.passes: list[list[list[int]]] = []
        self.fails = False
        self.begun, self.allowed = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr("sae_runtime.training.activations.reader.read_activations", self._read)
        streams = RowStreams(Counting(), n_streams=n_streams, mine=range(n_streams), rows_per_pass=2, skip_first=False)
        self.reader = ThreadedReader(None, SITES, streams, skip_first=False, names=range(n_streams), ahead=ahead)  # type: ignore[arg-type]

    def _read(self, _: Any, sites: list[Site], rows: list[list[int]], skip_first: bool) -> dict[Site, Tensor]:
        self.passes.append(rows)
        self.begun.release()
        assert self.allowed.acquire(timeout=30)
        if self.fails:
            raise RuntimeError("out of memory")
        return {site: torch.tensor(rows, dtype=torch.float32) for site in sites}


def test_it_reads_ahead_up_to_its_bound_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, n_streams=2, ahead=3)
    for _ in range(1000):
        gate.allowed.release()
    for expected in ([1, 3], [5, 7]):
        assert gate.reader.next_pass(0)[SITES[0]].flatten().tolist() == expected
    with gate.reader._changed:  # until both streams are full
        assert gate.reader._changed.wait_for(lambda: all(len(r) == 3 for r in gate.reader._ready.values()), 30)
    assert len(gate.passes) == 2 + 2 * 3
    gate.reader.close()
    assert len(gate.passes) == 2 + 2 * 3


def test_the_stream_that_is_waited_for_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Gate(monkeypatch, n_streams=3, ahead=2).reader  # its thread is not started

    def choice(ready: tuple[int, int, int], waiting: int | None) -> int | None:
        for stream, n in enumerate(ready):
            reader._ready[stream].clear()
            reader._ready[stream].extend([([], {})] * n)
        reader._waiting = waiting
        return reader._choose()

    assert choice((1, 0, 2), waiting=None) == 1
    assert choice((0, 0, 0), waiting=2) == 2
    assert choice((2, 1, 1), waiting=2) == 1  # it has one already
    assert choice((2, 2, 0), waiting=1) == 2
    assert choice((2, 2, 2), waiting=None) is None


def test_a_pass_that_failed_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, n_streams=1, ahead=2)
    gate.allowed.release(100)
    gate.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            gate.reader.next_pass(0)
    gate.fails = False
    assert gate.reader.next_pass(0)[SITES[0]].flatten().tolist() == [1, 2]
    assert gate.reader.next_pass(0)[SITES[0]].flatten().tolist() == [3, 4]
    gate.reader.close()


def test_a_state_in_the_middle_of_a_pass_gives_that_pass_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, n_streams=1, ahead=2)
    gate.allowed.release()
    assert gate.reader.next_pass(0)[SITES[0]].flatten().tolist() == [1, 2]
    for _ in range(2):
        assert gate.begun.acquire(timeout=30)  # the second pass is under way
    assert gate.reader.state_of(0)["again"] == [[[3], [4]]]
    # A position that is loaded meanwhile wins over what the thread was doing.
    state = gate.reader.state_of(0)
    gate.reader.load({0: state})
    gate.allowed.release(100)
    assert gate.reader.next_pass(0)[SITES[0]].flatten().tolist() == [3, 4]
    assert gate.reader.next_pass(0)[SITES[0]].flatten().tolist() == [5, 6]
    gate.reader.close()


def test_an_interrupted_wait_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, n_streams=1, ahead=1)
    wait = gate.reader._changed.wait

    def interrupted(timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(gate.reader._changed, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gate.reader.next_pass(0)
    monkeypatch.setattr(gate.reader._changed, "wait", wait)
    gate.allowed.release(100)
    assert gate.reader.next_pass(0)[SITES[0]].flatten().tolist() == [1, 2]
    gate.reader.close()
    assert not any(thread.name == "activations" for thread in threading.enumerate())
