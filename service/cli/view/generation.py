"""Generated text: streams as they arrive, and a table of their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from service.cli.view.output import open_console
from service.cli.view.tables import Entries, data_table, print_table, printable, token_column
from service.cli.view.tokens import visible
from service.client import GeneratedChunk, GenerationResult, TopTokens

_Key = tuple[bool, int]
"""A sequence: whether it is edited, and its sample. In this order, unedited ones come first."""


class GenerationView:
    """Prints text on standard output as it arrives, and its titles and figures on standard error.

    On a terminal, several sequences stand side by side. Elsewhere they are printed one after the other at the end.
    """

    def __init__(self, prompt: str, edits: str, *, samples: int, compare: bool) -> None:
        """`edits` describes the edits. There are `samples` sequences, and with `compare` as many without edits."""
        self._prompt = prompt
        self._edits = edits
        self._samples = samples
        self._is_single = samples == 1 and not compare
        self._out = open_console()
        self._about = open_console(stderr=True)
        self._texts: dict[_Key, str] = {}
        self._labels: dict[str, dict[int, str]] = {}
        self._printed: _Key | None = None
        self._live: Live | None = None

    def add(self, chunk: GeneratedChunk) -> None:
        """Adds the next chunk of any of the sequences."""
        key = (not chunk.unedited, chunk.sample)
        self._texts[key] = self._texts.get(key, "") + chunk.text
        for name, labels in chunk.labels.items():
            self._labels.setdefault(name, {}).update(labels)
        if self._is_single:
            self._print_chunk(key, chunk.text)
        elif self._out.is_terminal:
            if self._live is None:
                self._live = Live(console=self._out, refresh_per_second=12)
                self._live.start()
            self._live.update(self._panels())

    def _print_chunk(self, key: _Key, text: str) -> None:
        """Prints the only sequence, token by token."""
        if self._printed is None:
            self._print_head(key)
            self._printed = key
        self._out.print(Text(text), end="", soft_wrap=True)
        self._out.file.flush()

    def finish(self, results: Sequence[GenerationResult], seconds: float) -> None:
        """Prints what is left once all sequences have ended: texts not yet printed, figures, tables of tokens."""
        ordered = sorted(results, key=lambda result: (not result.unedited, result.sample))
        if self._live is not None:
            self._live.update(self._panels())
            self._live.stop()
        for result in ordered:
            key = (not result.unedited, result.sample)
            if self._live is not None:
                self._print_figures(result, self._title(key), seconds)
                continue
            if key != self._printed:
                self._print_head(key)
                self._out.print(Text(result.text), end="", soft_wrap=True)
            self._out.print()
            self._print_figures(result, "", seconds)
        for result in ordered:
            if result.top or result.features:
                if len(ordered) > 1:
                    self._out.print(Text(self._title((not result.unedited, result.sample)), style="bold cyan"))
                print_table(self._out, token_table(result))
        if self._labels:
            self._out.print()
            print_table(self._out, _label_table(self._labels))

    def _print_head(self, key: _Key) -> None:
        title = self._title(key)
        if title:
            self._about.print(Text(title, style="bold cyan"))
        self._out.print(Text(self._prompt, style="dim"), end="", soft_wrap=True)

    def _title(self, key: _Key) -> str:
        edited, sample = key
        edits = self._edits if edited else "without edits"
        number = f"sample {sample}" if self._samples > 1 else ""
        return ", ".join(filter(None, (edits, number)))

    def _panels(self) -> RenderableType:
        panels = [
            Panel(
                Group(Text.assemble((self._prompt, "dim"), text)),
                title=Text(self._title(key), style="bold cyan"),
                width=max(30, self._out.width // 2 - 1) if len(self._texts) > 1 else None,
            )
            for key, text in sorted(self._texts.items())
        ]
        return Columns(panels)

    def _print_figures(self, result: GenerationResult, title: str, seconds: float) -> None:
        rate = f"{result.generated_tokens / seconds:.0f} tokens/s"
        cut = f", {result.truncated_tokens:,} tokens of the prompt cut off" if result.truncated_tokens else ""
        figures = f"{result.generated_tokens} tokens, {_reason(result)}, seed {result.seed}, {rate}{cut}"
        self._about.print(Text(f"{title}: {figures}" if title else f"{figures}\n", style="dim"))


def token_table(result: GenerationResult) -> Table:
    """A row per token: its probability, the likeliest tokens at its position, and the features that fired on it."""
    dictionaries = list(result.features[0].dictionaries) if result.features else []
    number = Column("#", justify="right", style="dim")
    likeliest = [Column("likeliest")] if result.top else []
    features = [Column(name, style="cyan") for name in dictionaries]
    table = data_table(number, token_column(), "probability", *likeliest, *features)
    pieces, cells = _features_by_position(result, dictionaries)
    first_generated = result.prompt_tokens
    last = first_generated + len(result.token_ids)
    for position in range(min(cells, default=first_generated), last):
        place = position - first_generated
        token = visible(pieces[position]) if position in pieces else f"id {result.token_ids[place]}"
        row: list[RenderableType] = [str(position), Text(token, style="dim" if place < 0 else "")]
        row.append(f"{math.exp(result.logprobs[place]):.3f}" if place >= 0 else "")
        if result.top:
            row.append(_likeliest(result.top[place]) if place >= 0 else "")
        table.add_row(*row, *cells.get(position, ["" for _ in dictionaries]))
    return table


def _label_table(labels: Mapping[str, Mapping[int, str]]) -> Table:
    """What the features of the tables mean, as far as they have labels."""
    table = data_table("feature", Column("label"))
    for name, of_dictionary in labels.items():
        for feature, label in sorted(of_dictionary.items()):
            table.add_row(f"{name}:{feature}", printable(label))
    return table


def _features_by_position(
    result: GenerationResult, dictionaries: Iterable[str]
) -> tuple[dict[int, bytes], dict[int, list[Entries]]]:
    """By position: the bytes of the token if they are known, and a cell of features for each dictionary."""
    pieces: dict[int, bytes] = {}
    cells: dict[int, list[Entries]] = {}
    for features in result.features:
        for i in range(len(features.token_ids)):
            position = features.first_position + i
            if features.pieces:
                pieces[position] = features.pieces[i]
            cells[position] = [
                Entries(f"{f} {v:.2f}" for f, v in zip(*features.dictionaries[name].row(i), strict=True))
                for name in dictionaries
            ]
    for place, top in enumerate(result.top):
        for token, piece in zip(top.token_ids, top.pieces, strict=False):
            if token == result.token_ids[place]:
                pieces[result.prompt_tokens + place] = piece
    return pieces, cells


def _likeliest(top: TopTokens) -> Entries:
    pieces = [visible(piece) for piece in top.pieces] or [f"id {token}" for token in top.token_ids]
    return Entries(
        Text.assemble((piece, "bold"), (f" {math.exp(logprob):.3f}", "dim"))
        for piece, logprob in zip(pieces, top.logprobs, strict=True)
    )


def _reason(result: GenerationResult) -> str:
    """Why the sequence ended, in words; a reason that is unknown here as it is."""
    reasons = {"length": "length reached", "stop": f"met {result.stop!r}", "end_of_text": "end of text"}
    return reasons.get(result.finish_reason, result.finish_reason)
