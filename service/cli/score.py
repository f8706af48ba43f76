"""`saeserve score`: log-probabilities of texts, without and with edits."""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from service.cli.causal_options import (
    add_output_arguments,
    add_text_arguments,
    draw_plot,
    name_tokens,
    read_texts,
    token,
)
from service.cli.connection import add_connection_arguments, connected
from service.cli.edit_options import add_edit_arguments, describe, preset_edits, resolve_edits
from service.cli.json_output import print_json
from service.cli.tables import data_table, print_table, token_column
from service.cli.token_view import visible
from service.client import InputScore, Scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_arguments(parser)
    add_edit_arguments(parser)
    parser.add_argument(
        "--logit-token",
        action="append",
        default=[],
        type=token,
        metavar="TOKEN",
        help="follow the logit of this token: its text, such as ' Paris', or #ID (can be repeated)",
    )
    parser.add_argument("--summary", action="store_true", help="show one line a text, not its tokens")
    add_output_arguments(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    texts = read_texts(arguments, "score")
    with connected(arguments) as client:
        edits = resolve_edits(arguments, lambda: client.server_info().dictionaries)
        shown = list(edits)
        if arguments.presets:
            shown = preset_edits(arguments.presets, client.server_info().edit_presets) + shown
        scores = client.score(
            texts,
            edits,
            presets=arguments.presets,
            logit_tokens=arguments.logit_token,
            tokens=True,
            overflow="truncate" if arguments.truncate else "error",
        )
        names = name_tokens(client, scores.logit_token_ids)
    tokens = scores[0].tokens
    pieces = [] if tokens is None else [visible(piece) for piece in tokens.pieces]
    if arguments.json:
        print_json({"edits": shown, "scores": scores})
    else:
        console = Console(highlight=False, markup=False)
        console.print(Text(describe(shown), style="bold cyan"))
        if len(scores) > 1 or arguments.summary:
            print_table(console, _summary(texts, scores))
        if not arguments.summary:
            for number, each in enumerate(scores.inputs, 1):
                if len(scores) > 1:
                    console.print(f"\ntext {number} of {len(scores)}")
                print_table(console, _token_table(each, names))
        console.print(_totals(scores))
    if arguments.plot:
        from service.cli.causal_plots import draw_scores

        draw_plot(arguments.plot, lambda figure: draw_scores(figure, scores, pieces))
    return 0


def _token_table(score: InputScore, names: list[str]) -> Table:
    edited = score.edited
    number = Column("#", justify="right", style="dim")
    changes = () if edited is None else ("edited", "Δ loss", "KL")
    logits = (f"logit {name}" for name in names)
    table = data_table(number, token_column(), "loss", *changes, Column("right"), *logits)
    assert score.tokens is not None
    for i, piece in enumerate(score.tokens.pieces):
        # The prediction of token i is made after token i - 1.
        at = i - 1
        cells: list[str | Text] = [str(i), visible(piece)]
        if at < 0:
            table.add_row(*cells)
            continue
        cells.append(f"{score.unedited.loss[at]:.3f}")
        if edited is not None and score.kl is not None:
            change = float(edited.loss[at] - score.unedited.loss[at])
            cells += [f"{edited.loss[at]:.3f}", _signed(change), f"{score.kl[at]:.4f}"]
        before = bool(score.unedited.correct[at])
        after = before if edited is None else bool(edited.correct[at])
        cells.append(_right(before, after))
        for column in range(len(names)):
            logit = float(score.unedited.token_logits[at, column])
            cell = f"{logit:.2f}"
            if edited is not None:
                cell += f" {float(edited.token_logits[at, column]) - logit:+.2f}"
            cells.append(cell)
        table.add_row(*cells)
    return table


def _summary(texts: list[str], scores: Scores) -> Table:
    table = data_table(Column("text", max_width=40), "tokens", "loss", "edited", "Δ loss", "mean KL", "right", "edited")
    for text, each in zip(texts, scores.inputs, strict=True):
        cells: list[str | Text] = [" ".join(text.split()), str(each.n_tokens), f"{each.unedited.mean_loss:.3f}"]
        if each.edited is not None and each.kl is not None:
            change = each.edited.mean_loss - each.unedited.mean_loss
            cells += [f"{each.edited.mean_loss:.3f}", _signed(change), f"{each.kl.mean():.4f}"]
            cells += [f"{each.unedited.accuracy:.1%}", f"{each.edited.accuracy:.1%}"]
        else:
            cells += ["", "", "", f"{each.unedited.accuracy:.1%}", ""]
        table.add_row(*cells)
    return table


def _totals(scores: Scores) -> Text:
    before = np.concatenate([each.unedited.loss for each in scores.inputs])
    line = f"{len(before):,} predictions, mean loss {before.mean():.4f} nats"
    edited = [each.edited.loss for each in scores.inputs if each.edited is not None]
    kl = [each.kl for each in scores.inputs if each.kl is not None]
    if edited:
        after = np.concatenate(edited)
        line += f", edited {after.mean():.4f} ({after.mean() - before.mean():+.4f})"
        line += f", mean KL {np.concatenate(kl).mean():.4f}"
    return Text(line, style="dim")


def _signed(change: float) -> Text:
    style = "red" if change > 0.005 else "green" if change < -0.005 else ""
    return Text(f"{change:+.3f}", style=style)


def _right(before: bool, after: bool) -> str:
    if before == after:
        return "yes" if before else ""
    return "yes → no" if before else "no → yes"
