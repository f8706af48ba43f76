"""The features of a text: the text shaded by activation, and tables with bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console, RenderableType
from rich.style import Style
from rich.table import Column
from rich.text import Text

from service.cli.view.tables import Entries, data_table, label_column, print_table, printable, token_column
from service.client import DictionaryFeatures, InputFeatures, SparseRows

_BAR_CELLS = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FAINT, _STRONG = (255, 244, 224), (255, 138, 30)  # shades of orange, readable under black text
_SMALLEST_SHADE = 0.05


def show_tokens(
    console: Console, entry: InputFeatures, features: DictionaryFeatures, labels: Mapping[int, str]
) -> None:
    """Prints the shaded text, then a row for each token with its features, strongest first, and the first's label."""
    assert entry.tokens is not None
    rows = list(features.features)
    strongest = np.array([values[0] if len(values) else 0.0 for _, values in rows], np.float32)
    largest = float(strongest.max(initial=0.0))
    number, feature = Column("#", justify="right", style="dim"), Column("feature", justify="right", style="cyan")
    error = () if features.reconstruction_error is None else ("error",)
    activation, weaker = Column("activation", no_wrap=True), Column("others", style="dim")
    table = data_table(number, token_column(), feature, activation, *error, *label_column(labels), weaker)
    for i, (indices, values) in enumerate(rows):
        cells: list[RenderableType] = [str(i), visible(entry.tokens.pieces[i])]
        cells += [str(indices[0]), _bar(float(values[0]), largest)] if len(values) else ["-", ""]
        if features.reconstruction_error is not None:
            cells.append(f"{features.reconstruction_error[i]:.3f}")
        if labels:
            cells.append(printable(labels.get(int(indices[0]), "")) if len(indices) else "")
        cells.append(Entries(f"{f} {v:.2f}" for f, v in zip(indices[1:], values[1:], strict=True)))
        table.add_row(*cells)
    console.print(shaded(entry.tokens.pieces, strongest), end="\n\n")
    print_table(console, table)


def show_aggregate(console: Console, features: SparseRows, labels: Mapping[int, str]) -> None:
    """Prints a row for each feature of a text, strongest first."""
    indices, values = features.row(0)
    largest = float(values.max(initial=0.0))
    number, activations = Column("feature", justify="right", style="cyan"), Column("activation", no_wrap=True)
    table = data_table(number, activations, *label_column(labels))
    for feature, activation in zip(indices, values, strict=True):
        label = [printable(labels.get(int(feature), ""))] if labels else []
        table.add_row(str(feature), _bar(float(activation), largest), *label)
    if len(values):
        print_table(console, table)
    else:
        console.print(Text("no feature fires", style="dim"))


def shaded(pieces: Sequence[bytes], activations: Sequence[float] | np.ndarray, *, one_line: bool = False) -> Text:
    """The text of tokens with a background that is stronger where a token's activation is larger.

    Tokens that share a character, cut inside its UTF-8 bytes, are drawn as one, with the largest of their activations.
    With `one_line`, line breaks are drawn as signs, and control characters are escaped.
    """
    largest = max(*activations, 1e-9, 0.0) if len(activations) else 1.0
    text = Text()
    pending, strength = b"", 0.0
    for i, piece in enumerate(pieces):
        pending += piece
        strength = max(strength, float(activations[i]) / largest)
        cut_inside = i + 1 < len(pieces) and _ends_inside_character(pending)
        if not cut_inside:
            whole = pending.decode("utf-8", errors="replace")
            text.append(printable(whole) if one_line else whole, _shade(strength))
            pending, strength = b"", 0.0
    return text


def visible(piece: bytes) -> str:
    """A token with its white space made visible, and bytes that are no character escaped."""
    return printable(piece.decode("utf-8", errors="backslashreplace")).replace(" ", "·")


def _ends_inside_character(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _shade(strength: float) -> Style:
    if strength < _SMALLEST_SHADE:
        return Style.null()
    red, green, blue = (
        round(faint + (strong - faint) * strength) for faint, strong in zip(_FAINT, _STRONG, strict=True)
    )
    return Style(color="black", bgcolor=f"rgb({red},{green},{blue})")


def _bar(value: float, largest: float) -> Text:
    eighths = round(8 * _BAR_CELLS * value / largest) if largest > 0 else 0
    full_cells, eighths_left = divmod(max(eighths, 1), 8)
    bar = "█" * full_cells + (_EIGHTHS[eighths_left] if eighths_left else "")
    return Text.assemble((f"{bar:<{_BAR_CELLS}}", "dark_orange"), f" {value:.2f}")
