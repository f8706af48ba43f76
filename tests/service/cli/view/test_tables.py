"""Tables fit the terminal without cutting names, words and numbers; elsewhere a row is a line."""

import io

import pytest
from rich.console import Console
from rich.table import Column, Table

from service.cli.view.tables import Entries, data_table, fact_table, interval, print_table, token_column

NAME = "a-dictionary-with-a-long-name:12345"


def printed(table: Table, width: int | None) -> list[str]:
    """The lines of the table on a terminal of this width, or in a pipe."""
    console = Console(
        file=io.StringIO(), force_terminal=width is not None, color_system=None, width=width or 80, markup=False
    )
    print_table(console, table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return lines if width is None else [line.rstrip() for line in lines]


@pytest.fixture(autouse=True)
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def figures(n: int) -> Table:
    table = data_table("feature", *(f"figure number {i}" for i in range(n)))
    table.add_row(NAME, *(f"{i}.123456" for i in range(n)))
    return table


def test_a_narrow_terminal_wraps_headers_only() -> None:
    lines = printed(figures(4), 80)
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == [NAME, "0.123456", "1.123456", "2.123456", "3.123456"]


def test_columns_stand_closer_before_a_line_is_too_long() -> None:
    lines = printed(figures(5), len(NAME) + 5 * (8 + 1))
    assert lines[-1] == " ".join([NAME, *(f"{i}.123456" for i in range(5))])


def test_what_cannot_fit_is_printed_in_full() -> None:
    lines = printed(figures(6), 40)
    assert lines[-1].split() == [NAME, *(f"{i}.123456" for i in range(6))]


def test_a_pipe_gets_a_row_in_a_line() -> None:
    lines = printed(figures(12), None)
    assert len(lines) == 2
    assert lines[1].split() == [NAME, *(f"{i}.123456" for i in range(12))]


def test_a_pipe_gets_no_spaces_at_line_ends() -> None:
    table = data_table("feature", Column("text"), "loss")
    table.add_row("a", "long text", "1.25")
    table.add_row("b", "", "")
    assert printed(table, None) == ["feature  text       loss", "a        long text  1.25", "b"]
    assert printed(fact_table({"a": "short", "b": "a longer fact"}), None) == ["a  short", "b  a longer fact"]


def test_a_given_width_holds_for_a_pipe_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, printed(figures(4), None))) <= 80


def test_entries_are_not_broken() -> None:
    table = data_table("#", Column("features"))
    table.add_row("0", Entries(["12 3.45", "678 9.01", "234 5.67"]))
    assert printed(table, 80)[1:] == ["0  12 3.45  678 9.01  234 5.67"]
    assert printed(table_of_entries(), 22)[1:] == ["0  12 3.45  678 9.01", "   234 5.67"]
    assert printed(table_of_entries(), 5)[1:] == ["0 12 3.45", "  678 9.01", "  234 5.67"]


def table_of_entries() -> Table:
    table = data_table("#", Column("features"))
    table.add_row("0", Entries(["12 3.45", "678 9.01", "234 5.67"]))
    return table


def test_an_interval_takes_two_lines_at_most() -> None:
    table = data_table("feature", "95 %")
    table.add_row("a:1", interval(-0.5, 0.25))
    assert printed(table, 80)[1].split() == ["a:1", "-0.5000", "to", "+0.2500"]
    table = data_table("feature", "95 %")
    table.add_row("a:1", interval(-0.5, 0.25))
    assert printed(table, 19)[1:] == ["a:1      -0.5000 to", "            +0.2500"]


def test_only_text_is_cut() -> None:
    table = data_table("feature", token_column(), "loss")
    table.add_row(NAME, "a" * 40, "1.25")
    assert printed(table, None)[1].split() == [NAME, "a" * 23 + "…", "1.25"]
    table = data_table("feature", token_column(), "loss")
    table.add_row(NAME, "a" * 40, "1.25")
    assert printed(table, 51)[1].split() == [NAME, "a" * 7 + "…", "1.25"]


def test_facts_fold_on_a_terminal_only() -> None:
    path = "/a/folder/" + "b" * 100
    assert len(printed(fact_table({"path": path}), 80)) > 1
    assert printed(fact_table({"path": path}), None) == [f"path  {path}"]


def test_text_in_brackets_is_no_markup() -> None:
    assert printed(fact_table({"token": "[/b] [red]"}), 80) == ["token  [/b] [red]"]
