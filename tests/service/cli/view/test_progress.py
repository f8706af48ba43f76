"""Bars on a terminal, lines elsewhere."""

import io

from rich.console import Console

from sae_runtime.progress import Progress
from service.cli.view.progress import ProgressDisplay

FIGURES = {"nmse": 0.25, "l0": 4.0, "dead_fraction": 0.031, "loss": 1.0}


def test_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with ProgressDisplay(Console(file=stream, width=200)) as display:
        display.show(Progress("prepare", 0, 100))
        display.show(Progress("prepare", 100, 100, per_second=50.0))
        display.show(Progress("train", 0, 2000))
        display.show(Progress("train", 2000, 2000, "tokens", 1234.5, FIGURES))
        display.show(Progress("probes", 30, 30, "tasks", 2.0))
    assert stream.getvalue().splitlines() == [
        "prepare 0 of 100 tokens",
        "prepare 100 of 100 tokens  50 tokens/s",
        "train 0 of 2,000 tokens",
        "train 2,000 of 2,000 tokens  1,234 tokens/s  NMSE 0.2500  L0 4.0  dead 3.1 %",
        "probes 30 of 30 tasks",
    ]


def output_of(event: Progress) -> str:
    stream = io.StringIO()
    with ProgressDisplay(Console(file=stream, width=120, force_terminal=True, color_system=None)) as display:
        display.show(event)
    return stream.getvalue()


def test_a_bar_on_a_terminal() -> None:
    training = output_of(Progress("train", 500, 2000, "tokens", 1234.5, FIGURES))
    for text in ("train ", "25 %", "1,234 tokens/s  NMSE 0.2500  L0 4.0  dead 3.1 %"):
        assert text in training
    probes = output_of(Progress("probes", 3, 30, "tasks"))
    assert "10 %" in probes
    assert "3 tasks" in probes
