"""`saeserve contrast`: which features tell two sets of texts apart, and an edit made of them."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_runtime.causal.texts_needed import clearest_p_value, texts_needed
from service.cli.argument_types import natural
from service.cli.causal_options import add_output_arguments, add_truncate_argument, draw_plot
from service.cli.command_error import CommandError
from service.cli.connection import add_connection_arguments, connected
from service.cli.edit_options import describe
from service.cli.features import read_files
from service.cli.json_output import print_json
from service.cli.tables import Entries, data_table, print_table
from service.client import Contrast, SetScore, SuggestionTrial

DEFAULT_FDR = 0.05
"""At which the server counts what it finds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, which in (("a", "first"), ("b", "second")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="FILE",
            help=f"the {which} set: each line with words is a text; - is standard input (can be repeated)",
        )
        parser.add_argument(
            f"--{name}-text", action="append", default=[], metavar="TEXT", help=f"a text of the {which} set"
        )
    parser.add_argument(
        "--dictionary", action="append", default=[], metavar="NAME", help="compare this one (can be repeated) [all]"
    )
    parser.add_argument("--aggregate", choices=("max", "mean"), default="max", help="how a text's tokens are combined")
    parser.add_argument("--count", type=natural, metavar="N", help="show N features [20]")
    parser.add_argument(
        "--fdr", type=float, default=0.0, metavar="Q", help="show only features with a q-value of at most Q"
    )
    parser.add_argument(
        "--suggest", type=natural, default=0, metavar="N", help="suggest an edit towards the first set with N features"
    )
    parser.add_argument(
        "--validate", action="store_true", help="score the suggestion at several strengths on both sets"
    )
    add_truncate_argument(parser)
    add_output_arguments(parser)
    add_connection_arguments(parser)
    parser.set_defaults(timeout=300.0)  # long texts take a while


def run(arguments: argparse.Namespace) -> int:
    a = [*arguments.a_text, *read_files(arguments.a, lines=True)]
    b = [*arguments.b_text, *read_files(arguments.b, lines=True)]
    if min(len(a), len(b)) < 2:
        raise CommandError(
            f"the sets have {len(a)} and {len(b)} texts, expected at least 2 each: --a FILE --b FILE, a text a line",
            exit_code=2,
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
            overflow="truncate" if arguments.truncate else "error",
        )
    if arguments.json:
        print_json(contrast)
    else:
        console = Console(highlight=False, markup=False)
        console.print(
            Text(
                f"{len(a)} texts against {len(b)}; {contrast.n_tested:,} features tested, "
                f"{contrast.n_found:,} at a false discovery rate of 5 %\n",
                style="dim",
            )
        )
        if contrast.features:
            print_table(console, _table(contrast))
        if advice := _advice(contrast, len(a), len(b), arguments.fdr):
            console.print(Text(f"\n{advice}", style="yellow"))
        if arguments.suggest:
            _print_suggestion(console, contrast)
    if arguments.plot:
        from service.cli.causal_plots import draw_contrast

        draw_plot(arguments.plot, lambda figure: draw_contrast(figure, contrast))
    return 0


def _advice(contrast: Contrast, n_a: int, n_b: int, fdr: float) -> str:
    """What to say where no feature passes; nothing where some do."""
    passes = bool(contrast.features) if fdr else contrast.n_found > 0
    if passes or not contrast.n_tested:
        return "" if passes else "No feature fires on any of the texts."
    level = fdr or DEFAULT_FDR
    nothing = f"No feature passes a false discovery rate of {level:g}."
    p, needed_p = clearest_p_value(n_a, n_b), level / contrast.n_tested
    if p <= needed_p:
        return nothing
    return (
        f"{nothing} The texts are too few: a feature that fires on all texts of one set and on none of the other has "
        f"p = {p:.1e} with {n_a} and {n_b} texts, and passes alone among {contrast.n_tested:,} with p <= "
        f"{needed_p:.1e}. That takes {texts_needed(contrast.n_tested, level)} texts in each set."
    )


def _table(contrast: Contrast) -> Table:
    table = data_table("feature", "mean a", "mean b", "active a", "active b", "effect size", "AUC", "p", "q")
    for each in contrast.features:
        table.add_row(
            f"{each.feature[0]}:{each.feature[1]}",
            f"{each.mean_a:.3f}",
            f"{each.mean_b:.3f}",
            str(each.active_a),
            str(each.active_b),
            f"{each.effect_size:+.2f}",
            f"{each.auc:.3f}",
            f"{each.p_value:.1e}",
            f"{each.q_value:.1e}",
        )
    return table


def _print_suggestion(console: Console, contrast: Contrast) -> None:
    if not contrast.suggestion:
        console.print("\nNo feature that differs can be edited: no edit is suggested.")
        return
    console.print(Text(f"\nSuggested: {describe(contrast.suggestion)}", style="bold cyan"))
    if contrast.trials:
        table = data_table("edit", "Δ loss on a", "Δ loss on b", "favours a by", "KL a", "KL b")
        for trial in contrast.trials:
            table.add_row(*_trial(trial))
        print_table(console, table)
        console.print(Text("scored on the texts that the features were found on; nats a token, 95 %", style="dim"))


def _trial(trial: SuggestionTrial) -> list[str | Entries]:
    def change(score: SetScore) -> Entries:
        low, high = score.interval
        return Entries((f"{score.delta_loss:+.4f}", f"({low:+.4f} to", f"{high:+.4f})"), gap=" ")

    return [
        describe(trial.edits),
        change(trial.a),
        change(trial.b),
        f"{trial.shift:+.4f}",
        f"{trial.a.kl:.4f}",
        f"{trial.b.kl:.4f}",
    ]
