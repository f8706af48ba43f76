"""A table of names and what they are."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table


def fact_table(facts: Mapping[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table
