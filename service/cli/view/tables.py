"""Tables that fit the terminal and never cut what names a row, such as a feature.

On a terminal, wide columns wrap at spaces until the table fits; words and numbers stay whole. Elsewhere, such as in a
pipe, every row is one line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from service.cli.view.output import has_width

_LEAST_OF_TEXT = 8
"""Cells that a column of text keeps, when it is cut or folded to fit."""


def data_table(names: str | Column, *columns: str | Column, title: str | None = None) -> Table:
    """A table with a header. The first column names the rows; plain ones hold figures, and are aligned right."""
    first = Column(names, style="cyan", no_wrap=True) if isinstance(names, str) else names
    figures = [Column(column, justify="right") if isinstance(column, str) else column for column in columns]
    return Table(
        first,
        *figures,
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
        highlight=False,
    )


def fact_table(facts: Mapping[str, str | Text]) -> Table:
    """A table of names and what they are."""
    table = Table(Column(style="cyan", no_wrap=True), Column(overflow="fold"), box=None, show_header=False)
    table.pad_edge = False
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def token_column() -> Column:
    return Column("token", no_wrap=True, max_width=24)


def label_column(labels: Mapping[Any, Any]) -> list[Column]:
    """A column for labels of features, if there are any."""
    return [Column("label")] if any(labels.values()) else []


def printable(text: str) -> str:
    """A text on one line: signs for line breaks and tabs, other characters that cannot be printed escaped."""
    for space, sign in (("\n", "⏎"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(space, sign)
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def label_cells(labels: Mapping[str, Mapping[int, str]], feature: tuple[str, int]) -> list[str]:
    """The cell of a feature in `label_column`, if that is there."""
    name, number = feature
    return [printable(labels.get(name, {}).get(number, ""))] if any(labels.values()) else []


def print_table(console: Console, table: Table) -> None:
    """Prints a table in the width that there is, or wider where names, words and numbers need it."""
    whole = console.options.update(width=sys.maxsize, max_width=sys.maxsize)
    limits = [_limits(console, whole, column, table.show_header) for column in table.columns]
    gaps = 2 * (len(limits) - 1)
    widths = [limit.maximum for limit in limits]
    if has_width(console):
        least = [limit.minimum for limit in limits]
        if sum(least) + gaps > console.width:
            table.collapse_padding = True  # one space between columns
            gaps = len(limits) - 1
        _shrink(widths, least, console.width - gaps)
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    screen, console.width = console.width, max(console.width, sum(widths) + gaps)
    if console.is_terminal:
        console.print(table)
    else:  # without the spaces that fill every line to the width of the longest
        with console.capture() as capture:
            console.print(table)
        console.out("\n".join(line.rstrip(" ") for line in capture.get().split("\n")), end="", highlight=False)
    console.width = screen


def _limits(console: Console, options: ConsoleOptions, column: Column, has_header: bool) -> Measurement:
    """The narrowest and the widest that a column can be."""
    cells = [Measurement.get(console, options, cell) for cell in column.cells]
    header = Measurement.get(console, options, column.header) if has_header else Measurement(0, 0)
    widest = max((cell.maximum for cell in cells), default=0)
    if column.overflow == "fold" or column.max_width is not None:
        widest = min(widest, column.max_width or widest)
        least = min(widest, _LEAST_OF_TEXT)
    elif column.no_wrap:
        least = widest
    else:
        least = max((cell.minimum for cell in cells), default=0)
    return Measurement(max(least, header.minimum), max(widest, header.maximum))


def _shrink(widths: list[int], least: Sequence[int], available: int) -> None:
    """Takes cells from the widest column that can be narrower, until the columns fit or none can."""
    while sum(widths) > available:
        width, i = max(((width, i) for i, width in enumerate(widths) if width > least[i]), default=(0, -1))
        if i < 0:
            return
        widths[i] = width - 1


class Entries:
    """Entries of a cell, as many in a line as fit. None is broken."""

    def __init__(self, entries: Iterable[str | Text], gap: str = "  ") -> None:
        self._entries = [Text(entry) if isinstance(entry, str) else entry for entry in entries]
        self._gap = Text(gap)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line: list[Text] = []
        for entry in self._entries:
            if self._gap.join([*line, entry]).cell_len > options.max_width and line:
                yield self._gap.join(line)
                line = []
            line.append(entry)
        yield self._gap.join(line)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max((entry.cell_len for entry in self._entries), default=0)
        return Measurement(longest, self._gap.join(self._entries).cell_len)


def interval(low: float, high: float) -> Entries:
    return Entries((f"{low:+.4f} to", f"{high:+.4f}"), gap=" ")
