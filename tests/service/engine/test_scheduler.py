"""What runs next, by counts of tokens and turns alone: nothing here waits for real time."""

import pytest

from service.engine.errors import EngineStopped, QueueFull
from service.engine.scheduler import Piece, Scheduler, Turn, Work
from service.engine.settings import EngineSettings

pytestmark = pytest.mark.any_cpu


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def work(*sizes: int, kind: str = "a") -> Work:
    """Rows of so many tokens, whose content is their numbers."""
    return Work((kind, None), range(len(sizes)), sizes)


def scheduler(**settings: float) -> Scheduler[str]:
    return Scheduler(EngineSettings(**{"max_batch_tokens": 100, "batch_window_ms": 0, **settings}), Clock())


def take(s: Scheduler[str], generating: bool = False) -> list[Piece]:
    """The next batch."""
    pieces = s.next_turn(lambda: generating)
    assert isinstance(pieces, list)
    return pieces


def works(pieces: list[Piece]) -> list[Work]:
    return [piece.work for piece in pieces]


def tokens(pieces: list[Piece]) -> int:
    return sum(piece.tokens for piece in pieces)


def ran(*sizes: int) -> list[Piece]:
    """A batch of works of so many tokens that has run."""
    return [work(size).cut(size) for size in sizes]


def test_everything_that_fits_shares_a_batch() -> None:
    s = scheduler()
    waiting = [work(30), work(20, 20), work(30)]
    for w in waiting:
        s.put(w)
    assert set(works(take(s))) == set(waiting)
    assert s.queued_tokens == 0


def test_the_oldest_goes_first_with_those_of_its_length() -> None:
    s = scheduler()
    short, long = [work(10) for _ in range(6)], [work(45) for _ in range(4)]
    for w in (long[0], *short[:3], *long[1:], *short[3:]):
        s.put(w)
    assert works(take(s)) == [long[0], long[1]]  # 90 tokens; a short one would still fit, in length order only
    assert set(works(take(s))) == set(short)
    assert works(take(s)) == long[2:]


def test_nothing_waits_for_more_batches_than_there_were_works_before_it() -> None:
    s = scheduler()
    odd = work(77)
    for w in (work(9), work(9), odd):
        s.put(w)
    batches = 0
    while True:
        for _ in range(12):  # short work keeps arriving
            s.put(work(9))
        batches += 1
        if odd in works(take(s)):
            break
    assert batches <= 3


def test_kinds_do_not_mix() -> None:
    s = scheduler()
    a, b, c = work(10, kind="a"), work(10, kind="b"), work(10, kind="a")
    for w in (a, b, c):
        s.put(w)
    assert works(take(s)) == [a, c]
    assert works(take(s)) == [b]


class TestCutting:
    def test_a_work_over_the_budget_runs_in_pieces_in_order(self) -> None:
        s = scheduler()
        s.put(work(40, 50, 60, 30, 5, 90))
        pieces = [take(s)[0] for _ in range(3)]
        assert [list(piece.content) for piece in pieces] == [[0, 1], [2, 3, 4], [5]]
        assert [piece.tokens for piece in pieces] == [90, 95, 90]
        assert (s.queued_works, s.queued_tokens) == (0, 0)

    def test_a_row_over_the_budget_runs_alone(self) -> None:
        s = scheduler()
        huge, small = work(500), work(5)
        s.put(huge)
        s.put(small)
        assert works(take(s)) == [huge]
        assert works(take(s)) == [small]

    def test_what_the_oldest_leaves_is_filled_with_the_first_rows_of_others(self) -> None:
        s = scheduler()
        oldest, other = work(30, 30), work(20, 20, 20)
        s.put(oldest)
        s.put(other)
        assert [(piece.work, list(piece.content)) for piece in take(s)] == [(oldest, [0, 1]), (other, [0, 1])]
        assert s.queued_tokens == 20
        assert [(piece.work, list(piece.content)) for piece in take(s)] == [(other, [2])]

    def test_a_work_that_is_under_way_stays_the_oldest(self) -> None:
        s = scheduler()
        large, small = work(*[60] * 4), work(30)
        s.put(large)
        s.put(small)
        assert [works(take(s)) for _ in range(2)] == [[large, small], [large]]

    def test_what_is_discarded_runs_no_further(self) -> None:
        s = scheduler()
        large, next_one = work(*[60] * 4), work(90)
        s.put(large)
        s.put(next_one)
        take(s)
        s.discard(large)
        assert s.queued_tokens == 90
        assert works(take(s)) == [next_one]


def test_much_that_waits_runs_as_two_batches() -> None:
    s = scheduler(max_batch_tokens=1000, split_batch_tokens=20)
    waiting = [work(10) for _ in range(9)]
    s.put(waiting[0])
    first = take(s)
    s.batch_finished(first, 0.1)
    for w in waiting[1:]:
        s.put(w)
    second = take(s)
    assert works(second) == waiting[1:5]
    s.batch_finished(second, 0.1)
    # The other half is not split again, though it is as much as could be.
    assert works(take(s)) == waiting[5:]


def test_a_little_that_waits_runs_in_one_batch() -> None:
    s = scheduler(max_batch_tokens=1000, split_batch_tokens=20)
    few = [work(10) for _ in range(3)]
    for w in few:
        s.put(w)
    assert works(take(s)) == few


def test_the_queue_is_bounded_in_tokens() -> None:
    s = scheduler(max_queued_tokens=50)
    s.put(work(40))
    with pytest.raises(QueueFull, match="50 queued tokens") as error:
        s.put(work(11))
    assert error.value.limit_name == "max_queued_tokens"
    assert error.value.retry_after_s > 0
    s.put(work(10))
    assert s.queued_tokens == 50


def test_one_request_over_the_bound_may_wait_alone() -> None:
    s = scheduler(max_queued_tokens=50)
    s.put(work(70, 70))
    with pytest.raises(QueueFull):
        s.put(work(1))
    take(s)
    take(s)
    s.put(work(1))


def test_a_later_round_of_an_admitted_request_is_never_refused() -> None:
    s = scheduler(max_queued_tokens=50)
    s.put(work(50))
    s.put(work(30), under_way=True)
    assert s.queued_tokens == 80


def test_discarded_works_leave_at_once() -> None:
    s = scheduler(max_queued_tokens=50)
    gone, kept = work(40), work(10)
    s.put(gone)
    s.put(kept)
    s.discard(gone)
    assert (s.queued_works, s.queued_tokens) == (1, 10)
    assert works(take(s)) == [kept]
    s.discard(gone)  # what has left cannot leave again
    s.discard(kept)
    assert s.queued_tokens == 0


def test_the_estimate_of_a_full_queue_follows_the_speed() -> None:
    s = scheduler(max_queued_tokens=1000)
    s.put(work(1000))
    s.batch_finished(ran(500), seconds=1.0)
    with pytest.raises(QueueFull) as error:
        s.put(work(1))
    assert error.value.retry_after_s == pytest.approx(2.0)


class TestWindow:
    """`_window` is what `next_turn` waits for before a batch."""

    def test_no_wait_without_company(self) -> None:
        s = scheduler(batch_window_ms=5)
        s.put(work(10))
        assert s._window() <= 0
        s.batch_finished(ran(10), 0.1)
        assert s._window() <= 0

    def test_waits_after_a_batch_of_several_until_as_much_is_queued(self) -> None:
        s = scheduler(batch_window_ms=5)
        s.batch_finished(ran(10, 10), 0.1)
        s.put(work(10))
        assert s._window() == pytest.approx(0.005)
        s.put(work(10))
        assert s._window() <= 0

    def test_never_waits_longer_than_the_window(self) -> None:
        s = scheduler(batch_window_ms=5)
        s.batch_finished(ran(10, 10), 0.1)
        s.put(work(10))
        s._clock.now += 0.006  # type: ignore[attr-defined]
        assert s._window() <= 0
        assert take(s)


class TestTurns:
    def test_generation_and_batches_alternate_as_set(self) -> None:
        s = scheduler(generation_steps_per_batch=3, max_batch_tokens=10, max_queued_tokens=10_000)
        for _ in range(50):
            s.put(work(10))
        turns = ["g" if s.next_turn(lambda: True) is Turn.GENERATION else "b" for _ in range(40)]
        assert "".join(turns) == "gggb" * 10

    def test_a_batch_runs_at_once_after_many_steps_alone(self) -> None:
        s = scheduler(generation_steps_per_batch=3)
        for _ in range(10):
            assert s.next_turn(lambda: True) is Turn.GENERATION
        s.put(work(10))
        assert take(s, generating=True)

    @pytest.mark.parametrize("rows", [[(10,)] * 12, [(10,) * 12]], ids=["of many works", "of one work"])
    def test_batches_between_generation_steps_are_smaller(self, rows: list[tuple[int, ...]]) -> None:
        s = scheduler(generation_steps_per_batch=1, shared_batch_tokens=20)
        for sizes in rows:
            s.put(work(*sizes))
        counts = []
        for generating in (True, True, True, True, False):
            turn = s.next_turn(lambda generating=generating: generating)
            counts.append(tokens(turn) if isinstance(turn, list) else "g")
        assert counts == ["g", 20, "g", 20, 80]

    def test_waiting_generations_get_turns_in_arrival_order(self) -> None:
        s = scheduler()
        for name in "abc":
            s.put_generation(name, 5, free_slots=1)
        s.discard_generation("b")
        assert s.next_turn(lambda: False) is Turn.GENERATION
        assert [s.pop_generation() for _ in range(3)] == ["a", "c", None]
        assert s.queued_tokens == 0

    def test_waiting_generations_are_bounded(self) -> None:
        s = scheduler(max_queued_generations=2)
        for name in "abc":
            s.put_generation(name, 5, free_slots=1)
        with pytest.raises(QueueFull) as error:
            s.put_generation("d", 5, free_slots=1)
        assert error.value.limit_name == "max_queued_generations"


def test_closing_drops_what_waits_and_refuses_more() -> None:
    s = scheduler()
    s.put(work(10))
    s.put_generation("a", 5, free_slots=1)
    s.close()
    assert s.next_turn(lambda: True) is Turn.STOP
    assert s.pop_generation() is None
    assert s.queued_tokens == 0
    with pytest.raises(EngineStopped):
        s.put(work(1))
    with pytest.raises(EngineStopped):
        s.put_generation("b", 1, free_slots=1)
