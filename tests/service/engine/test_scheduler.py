import pytest

from service.engine.errors import EngineStopped, QueueFull
from service.engine.scheduler import Part, Scheduler, Turn
from service.engine.settings import EngineSettings

pytestmark = pytest.mark.any_cpu


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def part(length: int, rows: int = 1, kind: str = "a") -> Part:
    return Part((kind, None), length * rows, length, None)


def scheduler(**settings: float) -> Scheduler[str]:
    return Scheduler(EngineSettings(**{"max_batch_tokens": 100, "batch_window_ms": 0, **settings}), Clock())


def take(s: Scheduler[str], generating: bool = False) -> list[Part] | Turn:
    return s.next_turn(lambda: generating)


def test_everything_that_fits_shares_a_batch() -> None:
    s = scheduler()
    parts = [part(30), part(20, 2), part(30)]
    for p in parts:
        s.put([p])
    late = part(10)
    s.put([late])
    batch = take(s)
    assert isinstance(batch, list)
    assert sum(p.tokens for p in batch) <= 100
    assert parts[0] in batch
    rest = take(s)
    assert isinstance(rest, list)
    assert {*batch, *rest} == {*parts, late}


def test_the_oldest_goes_first_with_those_of_its_length() -> None:
    s = scheduler()
    short, long = [part(10) for _ in range(6)], [part(45) for _ in range(4)]
    for p in (long[0], *short[:3], *long[1:], *short[3:]):
        s.put([p])
    assert take(s) == [long[0], long[1]]  # 90 tokens; a short one would still fit, in length order only
    assert set(take(s)) == set(short)  # type: ignore[arg-type]
    assert take(s) == long[2:]


def test_nothing_waits_for_more_batches_than_there_were_parts_before_it() -> None:
    s = scheduler()
    odd = part(77)
    for p in (part(9), part(9), odd):
        s.put([p])
    batches = 0
    while True:
        for _ in range(12):  # short work keeps arriving
            s.put([part(9)])
        batches += 1
        if odd in take(s):  # type: ignore[operator]
            break
    assert batches <= 3


def test_kinds_do_not_mix() -> None:
    s = scheduler()
    a, b, c = part(10, kind="a"), part(10, kind="b"), part(10, kind="a")
    for p in (a, b, c):
        s.put([p])
    assert take(s) == [a, c]
    assert take(s) == [b]


def test_a_part_over_the_budget_runs_alone() -> None:
    s = scheduler()
    huge, small = part(500), part(5)
    s.put([huge])
    s.put([small])
    assert take(s) == [huge]
    assert take(s) == [small]


def test_much_that_waits_runs_as_two_batches() -> None:
    s = scheduler(max_batch_tokens=1000, split_batch_tokens=20)
    parts = [part(10) for _ in range(10)]
    s.put(parts[:1])
    first = take(s)
    s.batch_finished(first, 0.1)
    s.put(parts[1:9])
    second = take(s)
    assert second == parts[1:5]
    s.batch_finished(second, 0.1)
    # The other half is not split again, though it is as much as could be.
    assert take(s) == parts[5:9]


def test_a_little_that_waits_runs_in_one_batch() -> None:
    s = scheduler(max_batch_tokens=1000, split_batch_tokens=20)
    s.put(few := [part(10) for _ in range(3)])
    assert take(s) == few


def test_the_queue_is_bounded_in_tokens() -> None:
    s = scheduler(max_queued_tokens=50)
    s.put([part(40)])
    with pytest.raises(QueueFull, match="50 queued tokens") as error:
        s.put([part(11)])
    assert error.value.limit_name == "max_queued_tokens"
    assert error.value.retry_after_s > 0
    s.put([part(10)])
    assert s.queued_tokens == 50


def test_one_request_over_the_bound_may_wait_alone() -> None:
    s = scheduler(max_queued_tokens=50)
    s.put([part(70), part(70)])
    with pytest.raises(QueueFull):
        s.put([part(1)])
    take(s)
    take(s)
    s.put([part(1)])


def test_discarded_parts_leave_at_once() -> None:
    s = scheduler(max_queued_tokens=50)
    gone, kept = part(40), part(10)
    s.put([gone])
    s.put([kept])
    s.discard([gone])
    assert (s.queued_parts, s.queued_tokens) == (1, 10)
    assert take(s) == [kept]
    s.discard([gone, kept])  # what has left cannot leave again
    assert s.queued_tokens == 0


def test_the_estimate_of_a_full_queue_follows_the_speed() -> None:
    s = scheduler(max_queued_tokens=1000)
    s.put([part(1000)])
    s.batch_finished([part(500)], seconds=1.0)
    with pytest.raises(QueueFull) as error:
        s.put([part(1)])
    assert error.value.retry_after_s == pytest.approx(2.0)


class TestWindow:
    """`_window` is what `next_turn` waits for before a batch."""

    def test_no_wait_without_company(self) -> None:
        s = scheduler(batch_window_ms=5)
        s.put([part(10)])
        assert s._window() <= 0
        s.batch_finished([part(10)], 0.1)
        assert s._window() <= 0

    def test_waits_after_a_batch_of_several_until_as_much_is_queued(self) -> None:
        s = scheduler(batch_window_ms=5)
        s.batch_finished([part(10), part(10)], 0.1)
        s.put([part(10)])
        assert s._window() == pytest.approx(0.005)
        s.put([part(10)])
        assert s._window() <= 0

    def test_never_waits_longer_than_the_window(self) -> None:
        s = scheduler(batch_window_ms=5)
        s.batch_finished([part(10), part(10)], 0.1)
        s.put([part(10)])
        s._clock.now += 0.006  # type: ignore[attr-defined]
        assert s._window() <= 0
        assert isinstance(take(s), list)


class TestTurns:
    def test_generation_and_batches_alternate_as_set(self) -> None:
        s = scheduler(generation_steps_per_batch=3, max_batch_tokens=10, max_queued_tokens=10_000)
        for _ in range(50):
            s.put([part(10)])
        turns = ["g" if take(s, generating=True) is Turn.GENERATION else "b" for _ in range(40)]
        assert "".join(turns) == "gggb" * 10

    def test_a_batch_runs_at_once_after_many_steps_alone(self) -> None:
        s = scheduler(generation_steps_per_batch=3)
        for _ in range(10):
            assert take(s, generating=True) is Turn.GENERATION
        s.put([part(10)])
        assert isinstance(take(s, generating=True), list)

    def test_batches_between_generation_steps_are_smaller(self) -> None:
        s = scheduler(generation_steps_per_batch=1, shared_batch_tokens=20)
        for _ in range(12):
            s.put([part(10)])
        sizes = []
        for generating in (True, True, True, True, False):
            turn = take(s, generating)
            sizes.append(sum(p.tokens for p in turn) if isinstance(turn, list) else "g")
        assert sizes == ["g", 20, "g", 20, 80]

    def test_waiting_generations_get_turns_in_arrival_order(self) -> None:
        s = scheduler()
        for name in "abc":
            s.put_generation(name, 5, free_slots=1)
        s.discard_generation("b")
        assert take(s) is Turn.GENERATION
        assert [s.next_generation() for _ in range(3)] == ["a", "c", None]
        assert s.queued_tokens == 0

    def test_waiting_generations_are_bounded(self) -> None:
        s = scheduler(max_queued_generations=2)
        for name in "abc":
            s.put_generation(name, 5, free_slots=1)
        with pytest.raises(QueueFull) as error:
            s.put_generation("d", 5, free_slots=1)
        assert error.value.limit_name == "max_queued_generations"


def test_closing_returns_what_waits_and_refuses_more() -> None:
    s = scheduler()
    waiting = part(10)
    s.put([waiting])
    s.put_generation("a", 5, free_slots=1)
    assert s.close() == ([waiting], ["a"])
    assert take(s) is Turn.STOP
    assert s.queued_tokens == 0
    with pytest.raises(EngineStopped):
        s.put([part(1)])
    with pytest.raises(EngineStopped):
        s.put_generation("b", 1, free_slots=1)
