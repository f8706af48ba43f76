"""The progress of a long job: a bar for each stage on a terminal, a line every 10 seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sae_runtime import progress

_LOG_INTERVAL_S = 10.0


class ProgressDisplay:
    """Shows the stages of one job below each other."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._figures = ""
        self._line_at = 0.0

    def __enter__(self) -> ProgressDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, event: progress.Progress) -> None:
        """Shows an event of the job. Figures of training stay until new ones come."""
        if event.stage != self._stage:
            if self._task is not None:
                self._bars.update(self._task, completed=self._bars.tasks[self._task].total)
            self._task = self._bars.add_task(event.stage, total=event.total, figures="")
            self._stage, self._figures, self._line_at = event.stage, "", 0.0
        if event.figures or event.stage != "train":
            self._figures = _figures(event)
        assert self._task is not None
        figures = self._figures or f"{event.done:,} {event.unit}"
        self._bars.update(self._task, completed=event.done, total=event.total, figures=figures)
        done = event.done >= event.total
        if not self._console.is_terminal and (done or time.monotonic() - self._line_at > _LOG_INTERVAL_S):
            self._line_at = time.monotonic()
            done_of_total = f"{event.stage} {event.done:,} of {event.total:,} {event.unit}"
            self._console.print(f"{done_of_total}  {self._figures}".rstrip(), soft_wrap=True)


def _figures(event: progress.Progress) -> str:
    has_speed = event.per_second and event.unit == "tokens"
    figures = [f"{event.per_second:,.0f} tokens/s"] if has_speed else []
    if "nmse" in event.figures:
        nmse, l0, dead = (event.figures[name] for name in ("nmse", "l0", "dead_fraction"))
        figures += [f"NMSE {nmse:.4f}", f"L0 {l0:.1f}", f"dead {100 * dead:.1f} %"]
    return "  ".join(figures)
