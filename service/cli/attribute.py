"""`saeserve attribute`: which features on which tokens drive a logit."""

from __future__ import annotations

import argparse

from rich.table import Column, Table

from service.cli.connection import add_connection_arguments, connected
from service.cli.feature_names import add_dictionaries_argument
from service.cli.measure_options import MEASURE_TIMEOUT_S, add_output_arguments, draw_plot, name_tokens, token
from service.cli.parser import natural
from service.cli.ranking import add_ranking_argument, chosen_ranking, name_of
from service.cli.view.output import open_console, print_json, print_sentence
from service.cli.view.plots import draw_attributions
from service.cli.view.tables import data_table, label_cells, label_column, print_table, token_column
from service.cli.view.tokens import visible
from service.client import Attributions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="the text whose prediction is explained")
    parser.add_argument(
        "--target",
        type=token,
        metavar="TOKEN",
        help="explain the logit of this token: its text, or #ID [the likeliest]",
    )
    parser.add_argument("--foil", type=token, metavar="TOKEN", help="subtract the logit of this token")
    parser.add_argument(
        "--position", type=natural, metavar="N", help="explain the prediction after token N, counted from 0 [the last]"
    )
    add_dictionaries_argument(parser)
    parser.add_argument(
        "--count", type=natural, metavar="N", help="show the N largest pairs of a feature and a token [20]"
    )
    add_ranking_argument(parser)
    parser.add_argument("--truncate", action="store_true", help="drop the start of a text that is too long")
    add_output_arguments(parser)
    add_connection_arguments(parser)
    parser.set_defaults(timeout=MEASURE_TIMEOUT_S)


def run(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        ranking = chosen_ranking(arguments.rank_by, arguments.dictionary or None, client)
        result = client.attribute_features(
            arguments.text,
            arguments.dictionary or None,
            target=arguments.target,
            foil=arguments.foil,
            position=arguments.position,
            count=arguments.count,
            rank_by=ranking,
            tokens=True,
            labels=True,
            overflow="truncate" if arguments.truncate else "error",
        )
        logit_ids = [result.target_id] if result.foil_id is None else [result.target_id, result.foil_id]
        names = name_tokens(client, logit_ids)
    if arguments.json:
        print_json(result)
    else:
        console = open_console()
        metric = f"logit of {names[0]!r}" + (f" minus that of {names[1]!r}" if len(names) > 1 else "")
        order = "" if ranking == "activation" else f", pairs by {name_of(ranking)}"
        print_sentence(
            console, f"{metric} after token {result.position}: {result.metric:.3f}{order}\n", style="bold cyan"
        )
        print_table(console, _table(result))
        print_sentence(console, _summary(result), style="dim")
    draw_plot(arguments.plot, lambda figure: draw_attributions(figure, result))
    return 0


def _table(result: Attributions) -> Table:
    number = Column("#", justify="right", style="dim")
    figures = ("activation", "gradient", "attribution", "ablation")
    table = data_table("feature", number, token_column(), *figures, *label_column(result.labels))
    assert result.tokens is not None
    for pair in result.attributions:
        table.add_row(
            f"{pair.feature[0]}:{pair.feature[1]}",
            str(pair.position),
            visible(result.tokens.pieces[pair.position]),
            f"{pair.activation:.2f}",
            f"{pair.gradient:+.3f}",
            f"{pair.attribution:+.3f}",
            f"{pair.effect:+.3f}",
            *label_cells(result.labels, pair.feature),
        )
    return table


def _summary(result: Attributions) -> str:
    totals = ", ".join(f"{name} {total:+.3f}" for name, total in sorted(result.totals.items()))
    lines = f"\n{len(result.attributions)} of {result.n_active:,} active pairs; sum of all attributions: {totals}"
    if result.pearson is not None and result.spearman is not None:
        lines += (
            f"\nattribution against exact ablation of these pairs: Pearson {result.pearson:.3f}, "
            f"Spearman {result.spearman:.3f}"
        )
    return lines
