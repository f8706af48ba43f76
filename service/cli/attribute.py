"""`saeserve attribute`: which features on which tokens drive a logit."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from service.cli.argument_types import natural
from service.cli.causal_options import add_output_arguments, draw_plot, name_tokens, token
from service.cli.connection import add_connection_arguments, connected
from service.cli.json_output import print_json
from service.cli.tables import data_table, print_table, token_column
from service.cli.token_view import visible
from service.client import Attributions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="the text whose next token is explained")
    parser.add_argument(
        "--target", type=token, metavar="TOKEN", help="the token whose logit is explained: its text, or #ID [likeliest]"
    )
    parser.add_argument("--foil", type=token, metavar="TOKEN", help="a token whose logit is taken off")
    parser.add_argument(
        "--position", type=natural, metavar="N", help="explain what is predicted after token N [the last]"
    )
    parser.add_argument(
        "--dictionary", action="append", default=[], metavar="NAME", help="look in this one (can be repeated) [all]"
    )
    parser.add_argument("--count", type=natural, metavar="N", help="show N pairs of a feature and a token [20]")
    parser.add_argument("--truncate", action="store_true", help="drop the start of a text that is too long")
    add_output_arguments(parser)
    add_connection_arguments(parser)
    parser.set_defaults(timeout=300.0)  # long texts take a while


def run(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        found = client.attribute_features(
            arguments.text,
            arguments.dictionary or None,
            target=arguments.target,
            foil=arguments.foil,
            position=arguments.position,
            count=arguments.count,
            tokens=True,
            overflow="truncate" if arguments.truncate else "error",
        )
        names = name_tokens(client, [each for each in (found.target_id, found.foil_id) if each is not None])
    if arguments.json:
        print_json(found)
    else:
        console = Console(highlight=False, markup=False)
        what = f"logit of {names[0]!r}" + (f" less that of {names[1]!r}" if len(names) > 1 else "")
        console.print(Text(f"{what} after token {found.position}: {found.metric:.3f}\n", style="bold cyan"))
        print_table(console, _table(found))
        console.print(Text(_summary(found), style="dim"))
    if arguments.plot:
        from service.cli.causal_plots import draw_attributions

        draw_plot(arguments.plot, lambda figure: draw_attributions(figure, found))
    return 0


def _table(found: Attributions) -> Table:
    number = Column("#", justify="right", style="dim")
    table = data_table("feature", number, token_column(), "activation", "gradient", "attribution", "ablation")
    assert found.tokens is not None
    for each in found.attributions:
        table.add_row(
            f"{each.feature[0]}:{each.feature[1]}",
            str(each.position),
            visible(found.tokens.pieces[each.position]),
            f"{each.activation:.2f}",
            f"{each.gradient:+.3f}",
            f"{each.attribution:+.3f}",
            f"{each.effect:+.3f}",
        )
    return table


def _summary(found: Attributions) -> str:
    totals = ", ".join(f"{name} {total:+.3f}" for name, total in sorted(found.totals.items()))
    lines = f"\n{len(found.attributions)} of {found.n_active:,} active pairs; sum of all attributions: {totals}"
    if found.pearson is not None and found.spearman is not None:
        lines += (
            f"\nattribution and exact ablation of those shown: Pearson {found.pearson:.3f}, "
            f"Spearman {found.spearman:.3f}"
        )
    return lines
