"""Events of a job: few, complete, and with averages of what was done between them."""

import pytest

from sae_runtime.progress import Progress, ProgressMeter


def test_every_stage_begins_and_ends_with_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_runtime.progress.INTERVAL", 1e9)
    events: list[Progress] = []
    meter = ProgressMeter(events.append)
    meter.begin("probes", 3, "tasks")
    for done in (1, 2, 3):
        meter.reach(done)
    meter.begin("train", 100, done=40)
    meter.advance(20, {"nmse": 0.5})
    meter.advance(50, {"nmse": 0.25})
    assert [(e.stage, e.done, e.total, e.unit) for e in events] == [
        ("probes", 0, 3, "tasks"),
        ("probes", 3, 3, "tasks"),
        ("train", 40, 100, "tokens"),
        ("train", 100, 100, "tokens"),  # never more than the total
    ]
    assert events[-1].figures == {"nmse": 0.375}
    assert events[-1].per_second > 0
    assert events[0].figures == {}


def test_without_a_callback_nothing_happens() -> None:
    meter = ProgressMeter()
    meter.begin("train", 2)
    meter.advance(1, {"nmse": 1.0})
    meter.reach(2)
