"""`saeserve ablate`: how predictions on texts change when features are taken away, one at a time."""

from __future__ import annotations

import argparse

from rich.table import Column, Table

from sae_runtime.dictionary.ranking import Ranking
from service.cli.connection import add_connection_arguments, connected
from service.cli.feature_names import dictionary_of, feature_name
from service.cli.measure_options import (
    MEASURE_TIMEOUT_S,
    add_logit_argument,
    add_output_arguments,
    draw_plot,
    name_tokens,
)
from service.cli.parser import WRONG_USAGE, CommandError, natural
from service.cli.ranking import add_ranking_argument, chosen_ranking
from service.cli.text_arguments import add_text_arguments, read_texts
from service.cli.view.output import open_console, print_json, print_sentence
from service.cli.view.plots import draw_ablation
from service.cli.view.tables import Entries, data_table, interval, label_cells, label_column, print_table
from service.client import AblationStudy, FeatureEffect

DEFAULT_STRONGEST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_arguments(parser)
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument(
        "--feature",
        action="append",
        type=feature_name,
        metavar="[NAME:]FEATURE",
        help="ablate this feature (can be repeated)",
    )
    selection.add_argument(
        "--strongest",
        type=natural,
        default=DEFAULT_STRONGEST,
        metavar="N",
        help="ablate the N features that contribute most to the reconstruction of the texts",
    )
    parser.add_argument(
        "--dictionary",
        action="append",
        default=[],
        metavar="NAME",
        help="the dictionary of --feature, or one to take the strongest features from (can be repeated) [all]",
    )
    parser.add_argument(
        "--ablation",
        action="append",
        choices=("zero", "mean"),
        help="set features to zero or to their recorded mean (can be repeated) [zero]",
    )
    add_logit_argument(parser)
    parser.add_argument(
        "--distance",
        type=natural,
        default=0,
        metavar="N",
        help="also ablate a feature on single tokens, the N strongest of each text, and show the effect by distance",
    )
    parser.add_argument(
        "--rank-by", choices=("kl", "loss", "accuracy", "logit"), default="kl", help="sort features by this effect"
    )
    add_ranking_argument(parser, "--strongest-by")
    add_output_arguments(parser)
    add_connection_arguments(parser)
    parser.set_defaults(timeout=MEASURE_TIMEOUT_S)


def run(arguments: argparse.Namespace) -> int:
    texts = read_texts(arguments, "ablate")
    if arguments.feature and len(arguments.dictionary) > 1:
        raise CommandError("--feature takes one --dictionary; write NAME:FEATURE for others", WRONG_USAGE)
    with connected(arguments) as client:
        features: list[tuple[str, int]] | int = arguments.strongest
        strongest_by: Ranking = "activation"
        if arguments.feature:
            default = arguments.dictionary[0] if arguments.dictionary else None
            features = [(dictionary_of(name, default, client), name.feature) for name in arguments.feature]
        else:
            strongest_by = chosen_ranking(arguments.strongest_by, arguments.dictionary or None, client)
        study = client.ablate_features(
            texts,
            features,
            arguments.dictionary or None,
            ablations=arguments.ablation or ["zero"],
            logit_tokens=arguments.logit_token,
            single_tokens=arguments.distance,
            rank_by=arguments.rank_by,
            strongest_by=strongest_by,
            labels=True,
            overflow="truncate" if arguments.truncate else "error",
        )
        names = name_tokens(client, study.logit_token_ids)
    if arguments.json:
        print_json(study)
    else:
        console = open_console()
        print_sentence(
            console,
            f"{study.n_texts} texts, {study.n_targets:,} predictions, loss {study.loss:.3f} nats, "
            f"{study.accuracy:.1%} right without ablation\n",
            style="dim",
        )
        print_table(console, _table(study, names))
        if arguments.distance:
            console.print()
            print_table(console, _distance_table(study))
    draw_plot(arguments.plot, lambda figure: draw_ablation(figure, study))
    return 0


def _table(study: AblationStudy, names: list[str]) -> Table:
    """What ablating each feature does to all predictions; `names` are the tokens whose logits are shown."""
    figures = ("active on", "Δ loss", "95 %", "Δ right", "KL", "KL where active")
    logits = (f"Δ logit {name}" for name in names)
    table = data_table("feature", *_ablation_column(study), *figures, *logits, *label_column(study.labels))
    for effect in study.effects:
        cells: list[str | Entries] = [
            *_effect_name(study, effect),
            f"{effect.active_tokens:,} in {effect.active_texts}",
            f"{effect.everywhere.delta_loss:+.4f}",
            interval(*effect.delta_loss_interval),
            f"{effect.everywhere.delta_accuracy:+.2%}",
            f"{effect.everywhere.kl:.4f}",
            f"{effect.at_active.kl:.4f}",
        ]
        cells += [f"{change:+.3f}" for change in effect.everywhere.delta_logits]
        cells += label_cells(study.labels, effect.feature)
        table.add_row(*cells)
    return table


def _distance_table(study: AblationStudy) -> Table:
    """KL by distance from a single ablated token, in the server's buckets of distances."""
    buckets = sorted({(distance.first, distance.last) for effect in study.effects for distance in effect.by_distance})
    columns = (str(first) if first == last else f"{first}-{last}" for first, last in buckets)
    title = "KL by distance from the ablated token"
    table = data_table("feature", *_ablation_column(study), *columns, title=title)
    for effect in study.effects:
        kl = {(distance.first, distance.last): distance.figures.kl for distance in effect.by_distance}
        cells = (f"{kl[bucket]:.4f}" if bucket in kl else "" for bucket in buckets)
        table.add_row(*_effect_name(study, effect), *cells)
    return table


def _ablation_column(study: AblationStudy) -> list[Column]:
    """What features were set to, in studies that did both."""
    return [Column("set to")] if len({effect.ablation for effect in study.effects}) > 1 else []


def _effect_name(study: AblationStudy, effect: FeatureEffect) -> list[str]:
    name = f"{effect.feature[0]}:{effect.feature[1]}"
    return [name, effect.ablation] if _ablation_column(study) else [name]
