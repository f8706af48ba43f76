"""`saeserve score`: the loss of texts, without and with edits."""

from __future__ import annotations

import argparse

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from service.cli.connection import add_connection_arguments, connected
from service.cli.edit_options import add_edit_arguments, describe, resolve_edits
from service.cli.measure_options import add_logit_argument, add_output_arguments, draw_plot, name_tokens
from service.cli.text_arguments import add_text_arguments, read_texts
from service.cli.view.output import open_console, print_json, print_sentence
from service.cli.view.plots import draw_scores
from service.cli.view.tables import data_table, print_table, token_column
from service.cli.view.tokens import visible
from service.client import InputScore, Scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_arguments(parser)
    add_edit_arguments(parser)
    add_logit_argument(parser)
    parser.add_argument("--summary", action="store_true", help="show one line per text instead of its tokens")
    add_output_arguments(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    texts = read_texts(arguments, "score")
    with connected(arguments) as client:
        edits, preset_edits = resolve_edits(arguments, client)
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
        print_json({"edits": preset_edits + edits, "scores": scores})
    else:
        console = open_console()
        print_sentence(console, describe(preset_edits + edits), style="bold cyan")
        if len(scores) > 1 or arguments.summary:
            print_table(console, _summary(texts, scores))
        if not arguments.summary:
            for number, score in enumerate(scores.inputs, 1):
                if len(scores) > 1:
                    console.print(f"\ntext {number} of {len(scores)}")
                print_table(console, _token_table(score, names))
        print_sentence(console, _totals(scores), style="dim")
    draw_plot(arguments.plot, lambda figure: draw_scores(figure, scores, pieces))
    return 0


def _token_table(score: InputScore, names: list[str]) -> Table:
    """A row per token: how well it was predicted, and the logits of the tokens `names` at that prediction."""
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
    """A row per text."""
    edited = scores[0].edited is not None
    figures = ("loss", "edited", "Δ loss", "mean KL", "right", "edited") if edited else ("loss", "right")
    table = data_table(Column("text", no_wrap=True, max_width=40), "tokens", *figures)
    for text, score in zip(texts, scores.inputs, strict=True):
        loss, accuracy = score.unedited.mean_loss, score.unedited.accuracy
        cells: list[str | Text] = [" ".join(text.split()), str(score.n_tokens), f"{loss:.3f}"]
        if score.edited is not None and score.kl is not None:
            change = score.edited.mean_loss - loss
            cells += [f"{score.edited.mean_loss:.3f}", _signed(change), f"{score.kl.mean():.4f}"]
            cells += [f"{accuracy:.1%}", f"{score.edited.accuracy:.1%}"]
        else:
            cells.append(f"{accuracy:.1%}")
        table.add_row(*cells)
    return table


def _totals(scores: Scores) -> str:
    before = np.concatenate([score.unedited.loss for score in scores.inputs])
    line = f"{len(before):,} predictions, mean loss {before.mean():.4f} nats"
    edited = [score.edited.loss for score in scores.inputs if score.edited is not None]
    kl = [score.kl for score in scores.inputs if score.kl is not None]
    if edited:
        after = np.concatenate(edited)
        line += f", edited {after.mean():.4f} ({after.mean() - before.mean():+.4f})"
        line += f", mean KL {np.concatenate(kl).mean():.4f}"
    return line


def _signed(change: float) -> Text:
    style = "red" if change > 0.005 else "green" if change < -0.005 else ""
    return Text(f"{change:+.3f}", style=style)


def _right(before: bool, after: bool) -> str:
    if before == after:
        return "yes" if before else ""
    return "yes → no" if before else "no → yes"
