"""`saeserve contrast`: which features tell two sets of texts apart, and an edit made of them."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Column, Table

from sae_runtime.causal.texts_needed import clearest_p_value, texts_needed
from service.cli.connection import add_connection_arguments, connected
from service.cli.edit_options import describe
from service.cli.feature_names import add_dictionaries_argument
from service.cli.measure_options import MEASURE_TIMEOUT_S, add_output_arguments, draw_plot
from service.cli.parser import WRONG_USAGE, CommandError, natural
from service.cli.text_arguments import add_truncate_argument, read_files
from service.cli.view.output import open_console, print_json, print_sentence
from service.cli.view.plots import draw_contrast
from service.cli.view.tables import Entries, data_table, label_cells, label_column, print_table
from service.client import Contrast, SetScore, SuggestionTrial

DEFAULT_FDR = 0.05
"""The level at which the server counts features that differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, ordinal in (("a", "first"), ("b", "second")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="FILE",
            help=f"the {ordinal} set, a text a line; - is standard input (can be repeated)",
        )
        parser.add_argument(
            f"--{name}-text",
            action="append",
            default=[],
            metavar="TEXT",
            help=f"a text of the {ordinal} set (can be repeated)",
        )
    add_dictionaries_argument(parser)
    parser.add_argument(
        "--aggregate", choices=("max", "mean"), default="max", help="how to combine the tokens of a text"
    )
    parser.add_argument("--count", type=natural, metavar="N", help="show the N clearest features [20]")
    parser.add_argument(
        "--fdr",
        type=float,
        default=0.0,
        metavar="Q",
        help="show only features with a q-value of at most Q; 0 shows all",
    )
    parser.add_argument(
        "--suggest", type=natural, default=0, metavar="N", help="suggest edits of N features towards the first set"
    )
    parser.add_argument(
        "--validate", action="store_true", help="score the suggested edits at several strengths on both sets"
    )
    add_truncate_argument(parser)
    add_output_arguments(parser)
    add_connection_arguments(parser)
    parser.set_defaults(timeout=MEASURE_TIMEOUT_S)


def run(arguments: argparse.Namespace) -> int:
    a = [*arguments.a_text, *read_files(arguments.a, lines=True)]
    b = [*arguments.b_text, *read_files(arguments.b, lines=True)]
    if min(len(a), len(b)) < 2:
        raise CommandError(
            f"the sets have {len(a)} and {len(b)} texts, expected at least 2 each: --a FILE --b FILE, a text a line",
            WRONG_USAGE,
        )
    with connected(arguments) as client:
        contrast = client.contrast_features(
            a,
            b,
            arguments.dictionary or None,
            aggregation=arguments.aggregate,
            count=arguments.count,
            false_discovery_rate=arguments.fdr,
            suggest=arguments.suggest,
            validate=arguments.validate,
            labels=True,
            overflow="truncate" if arguments.truncate else "error",
        )
    if arguments.json:
        print_json(contrast)
    else:
        console = open_console()
        print_sentence(
            console,
            f"{len(a)} texts against {len(b)}; {contrast.n_found:,} of {contrast.n_tested:,} features differ "
            f"(false discovery rate {DEFAULT_FDR:g})\n",
            style="dim",
        )
        if contrast.features:
            print_table(console, _table(contrast))
        if advice := _advice(contrast, len(a), len(b), arguments.fdr):
            print_sentence(console, f"\n{advice}", style="yellow")
        if arguments.suggest:
            _print_suggestion(console, contrast)
    draw_plot(arguments.plot, lambda figure: draw_contrast(figure, contrast))
    return 0


def _advice(contrast: Contrast, n_a: int, n_b: int, fdr: float) -> str:
    """Why no feature passes, or an empty string if one does."""
    passes = bool(contrast.features) if fdr else contrast.n_found > 0
    if passes or not contrast.n_tested:
        return "" if passes else "No feature fires on any of the texts."
    level = fdr or DEFAULT_FDR
    verdict = f"No feature passes a false discovery rate of {level:g}."
    p, needed_p = clearest_p_value(n_a, n_b), level / contrast.n_tested
    if p <= needed_p:
        return verdict
    return (
        f"{verdict} There are too few texts: with {n_a} and {n_b}, even a feature that fires on all texts of one set "
        f"and on none of the other has p = {p:.1e}. To pass among {contrast.n_tested:,} features it needs p <= "
        f"{needed_p:.1e}, which takes {texts_needed(contrast.n_tested, level)} texts in each set."
    )


def _table(contrast: Contrast) -> Table:
    figures = ("mean a", "mean b", "active a", "active b", "effect size", "AUC", "p", "q")
    table = data_table("feature", *figures, *label_column(contrast.labels))
    for feature in contrast.features:
        table.add_row(
            f"{feature.feature[0]}:{feature.feature[1]}",
            f"{feature.mean_a:.3f}",
            f"{feature.mean_b:.3f}",
            str(feature.active_a),
            str(feature.active_b),
            f"{feature.effect_size:+.2f}",
            f"{feature.auc:.3f}",
            f"{feature.p_value:.1e}",
            f"{feature.q_value:.1e}",
            *label_cells(contrast.labels, feature.feature),
        )
    return table


def _print_suggestion(console: Console, contrast: Contrast) -> None:
    if not contrast.suggestion:
        print_sentence(console, "\nNo edit is suggested: no feature that differs can be edited.")
        return
    print_sentence(console, f"\nSuggested: {describe(contrast.suggestion)}", style="bold cyan")
    if contrast.trials:
        table = data_table(Column("edits", style="cyan"), "Δ loss on a", "Δ loss on b", "favours a by", "KL a", "KL b")
        for trial in contrast.trials:
            table.add_row(*_trial(trial))
        print_table(console, table)
        print_sentence(
            console,
            "in nats per token, with 95 % intervals, on the texts that the features were chosen on",
            style="dim",
        )


def _trial(trial: SuggestionTrial) -> list[str | Entries]:
    """The cells of one strength."""

    def change(score: SetScore) -> Entries:
        low, high = score.interval
        return Entries((f"{score.delta_loss:+.4f}", f"({low:+.4f} to", f"{high:+.4f})"), gap=" ")

    *edits, last_edit = (describe([edit]) for edit in trial.edits)
    return [
        Entries([*(f"{edit}," for edit in edits), last_edit], gap=" "),
        change(trial.a),
        change(trial.b),
        f"{trial.shift:+.4f}",
        f"{trial.a.kl:.4f}",
        f"{trial.b.kl:.4f}",
    ]
