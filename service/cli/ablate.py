"""`saeserve ablate`: what taking features away, one at a time, does to the predictions on texts."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from service.cli.argument_types import natural
from service.cli.causal_options import (
    add_output_arguments,
    add_text_arguments,
    draw_plot,
    name_tokens,
    read_texts,
    token,
)
from service.cli.command_error import CommandError
from service.cli.connection import add_connection_arguments, connected
from service.cli.feature_names import dictionary_of, feature_name
from service.cli.json_output import print_json
from service.cli.tables import Entries, data_table, interval, print_table
from service.client import AblationStudy, FeatureEffect

DEFAULT_STRONGEST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--feature",
        action="append",
        type=feature_name,
        metavar="[NAME:]FEATURE",
        help="ablate this feature (can be repeated)",
    )
    which.add_argument(
        "--strongest",
        type=natural,
        default=DEFAULT_STRONGEST,
        metavar="N",
        help="ablate the N features that write most on the texts",
    )
    parser.add_argument(
        "--dictionary",
        action="append",
        default=[],
        metavar="NAME",
        help="dictionary of bare feature numbers, or of the strongest (can be repeated there) [all]",
    )
    parser.add_argument(
        "--ablation",
        action="append",
        choices=("zero", "mean"),
        help="with what a feature is replaced (can be repeated) [zero]",
    )
    parser.add_argument(
        "--logit-token",
        action="append",
        default=[],
        type=token,
        metavar="TOKEN",
        help="follow the logit of this token: its text, such as ' Paris', or #ID (can be repeated)",
    )
    parser.add_argument(
        "--distance",
        type=natural,
        default=0,
        metavar="N",
        help="also change the N tokens of each text on which a feature is strongest alone, and show how far it reaches",
    )
    parser.add_argument(
        "--rank-by", choices=("kl", "loss", "accuracy", "logit"), default="kl", help="the figure that sorts features"
    )
    add_output_arguments(parser)
    add_connection_arguments(parser)
    parser.set_defaults(timeout=300.0)  # a study may run many variants


def run(arguments: argparse.Namespace) -> int:
    texts = read_texts(arguments, "ablate")
    if arguments.feature and len(arguments.dictionary) > 1:
        raise CommandError("--feature takes one --dictionary; write NAME:FEATURE for others", exit_code=2)
    with connected(arguments) as client:
        features: list[tuple[str, int]] | int = arguments.strongest
        if arguments.feature:
            default = arguments.dictionary[0] if arguments.dictionary else None
            loaded = lambda: client.server_info().dictionaries  # noqa: E731
            features = [(dictionary_of(each, default, loaded), each.feature) for each in arguments.feature]
        study = client.ablate_features(
            texts,
            features,
            arguments.dictionary or None,
            ablations=arguments.ablation or ["zero"],
            logit_tokens=arguments.logit_token,
            single_tokens=arguments.distance,
            rank_by=arguments.rank_by,
            overflow="truncate" if arguments.truncate else "error",
        )
        names = name_tokens(client, study.logit_token_ids)
    if arguments.json:
        print_json(study)
    else:
        console = Console(highlight=False, markup=False)
        console.print(
            Text(
                f"{study.n_texts} texts, {study.n_targets:,} predictions, loss {study.loss:.3f} nats, "
                f"{study.accuracy:.1%} right without ablation\n",
                style="dim",
            )
        )
        print_table(console, _table(study, names, several=len(arguments.ablation or []) > 1))
        if arguments.distance:
            console.print()
            print_table(console, _distance_table(study))
    if arguments.plot:
        from service.cli.causal_plots import draw_ablation

        draw_plot(arguments.plot, lambda figure: draw_ablation(figure, study))
    return 0


def _table(study: AblationStudy, names: list[str], several: bool) -> Table:
    replaced = [Column("to")] if several else []
    figures = ("active on", "Δ loss", "95 %", "Δ right", "KL", "KL where active")
    table = data_table("feature", *replaced, *figures, *(f"Δ logit {name}" for name in names))
    for effect in study.effects:
        cells: list[str | Entries] = [_name(effect)]
        if several:
            cells.append(effect.ablation)
        cells += [
            f"{effect.active_tokens:,} in {effect.active_texts}",
            f"{effect.everywhere.delta_loss:+.4f}",
            interval(*effect.delta_loss_interval),
            f"{effect.everywhere.delta_accuracy:+.2%}",
            f"{effect.everywhere.kl:.4f}",
            f"{effect.at_active.kl:.4f}",
        ]
        cells += [f"{change:+.3f}" for change in effect.everywhere.delta_logits]
        table.add_row(*cells)
    return table


def _distance_table(study: AblationStudy) -> Table:
    buckets = sorted({(each.first, each.last) for effect in study.effects for each in effect.by_distance})
    columns = (str(first) if first == last else f"{first}-{last}" for first, last in buckets)
    table = data_table("feature", *columns, title="KL by distance from the changed token")
    for effect in study.effects:
        found = {(each.first, each.last): each.figures.kl for each in effect.by_distance}
        table.add_row(_name(effect), *(f"{found[bucket]:.4f}" if bucket in found else "" for bucket in buckets))
    return table


def _name(effect: FeatureEffect) -> str:
    return f"{effect.feature[0]}:{effect.feature[1]}"
