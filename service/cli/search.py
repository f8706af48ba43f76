"""`saeserve search`: features by words of their labels, tokens and contexts, or by texts that they fire on."""

from __future__ import annotations

import argparse
from collections.abc import Collection

from rich.table import Column, Table

from service.cli.connection import add_connection_arguments, connected
from service.cli.feature_names import add_dictionaries_argument
from service.cli.parser import WRONG_USAGE, CommandError, natural
from service.cli.text_arguments import add_truncate_argument
from service.cli.view.feature_page import percent
from service.cli.view.output import add_json_argument, open_console, print_json, print_sentence
from service.cli.view.tables import Entries, data_table, print_table, printable
from service.cli.view.tokens import visible
from service.client import FeatureSearch

_SHOWN_TOKENS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help='words of labels, tokens or contexts; a symbol, such as "=", means the token that is just this symbol',
    )
    parser.add_argument(
        "--fires-on",
        action="append",
        default=[],
        metavar="TEXT",
        help="instead of words: find features that fire on this text (can be repeated: on all of them)",
    )
    parser.add_argument(
        "--silent-on", action="append", default=[], metavar="TEXT", help="and not on this text (can be repeated)"
    )
    add_truncate_argument(parser)
    add_dictionaries_argument(parser)
    parser.add_argument("--limit", type=natural, metavar="N", help="show the N best features [20]")
    add_json_argument(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    words = " ".join(arguments.words)
    if bool(words.strip()) == bool(arguments.fires_on) or (arguments.silent_on and not arguments.fires_on):
        raise CommandError('give words, or --fires-on TEXT; try: saeserve search "spanish"', WRONG_USAGE)
    with connected(arguments) as client:
        found = client.search_features(
            words,
            arguments.dictionary,
            fires_on=arguments.fires_on,
            silent_on=arguments.silent_on,
            limit=arguments.limit,
            overflow="truncate" if arguments.truncate else "error",
        )
        catalogued = {dictionary.name for dictionary in client.list_dictionaries() if dictionary.has_catalogue}
    if arguments.json:
        print_json(found)
        return 0
    console = open_console()
    if found.hits:
        print_table(console, _table(found, catalogued, by_text=bool(arguments.fires_on)))
        first = found.hits[0]
        hint = f"\n`saeserve feature {first.dictionary}:{first.summary.feature}` shows the first of them"
    else:
        hint = "no feature found"
    if found.without_catalogue:
        hint += f"; without a catalogue, only written labels were searched: {', '.join(found.without_catalogue)}"
    print_sentence(console, hint, style="dim")
    return 0


def _table(found: FeatureSearch, catalogued: Collection[str], by_text: bool) -> Table:
    """`catalogued` are the dictionaries with a catalogue: for their features, a label was looked for."""
    activation = ["activation"] if by_text else []
    table = data_table("feature", *activation, Column("label"), "F1", "fires on", Column("tokens", style="dim"))
    for hit in found.hits:
        summary = hit.summary
        cells: list[str | Entries] = [f"{hit.dictionary}:{summary.feature}"]
        cells += [f"{hit.activation:.2f}"] if by_text else []
        cells += [
            printable(summary.label) or ("no simple label" if hit.dictionary in catalogued else ""),
            "" if summary.label_f1 is None else f"{summary.label_f1:.2f}",
            percent(summary.firing_rate) if summary.firing_rate or hit.dictionary in catalogued else "",
            Entries((visible(token) for token in summary.top_tokens[:_SHOWN_TOKENS]), gap=" "),
        ]
        table.add_row(*cells)
    return table
