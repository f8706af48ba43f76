"""`saeserve features`: which features fire on a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from service.cli.argument_types import natural
from service.cli.command_error import CommandError
from service.cli.connection import add_connection_arguments, connected
from service.cli.feature_names import FeatureName, feature_name
from service.cli.json_output import print_json
from service.cli.token_view import show_aggregate, show_tokens
from service.client import DictionaryFeatures, Extraction, InputFeatures, Limits, Tokens
from service.client.options import ExtractOptions

DEFAULT_TOP_K = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts to look at")
    parser.add_argument(
        "--file", action="append", default=[], metavar="FILE", help="look at the text of a file; - is standard input"
    )
    parser.add_argument(
        "--lines", action="store_true", help="make each line of the files that has words a text of its own"
    )
    parser.add_argument(
        "--dictionary", action="append", default=[], metavar="NAME", help="read this dictionary (can be repeated) [all]"
    )
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument(
        "--top-k", type=natural, metavar="K", help=f"show the K strongest features of each token [{DEFAULT_TOP_K}]"
    )
    selection.add_argument("--threshold", type=float, metavar="A", help="show features with an activation above A")
    selection.add_argument(
        "--feature",
        action="append",
        type=feature_name,
        metavar="[NAME:]FEATURE",
        help="show this feature only (can be repeated)",
    )
    parser.add_argument(
        "--aggregate",
        choices=("none", "max", "mean", "sum", "last"),
        default="none",
        help="how to combine the tokens of a text",
    )
    parser.add_argument("--reconstruction-error", action="store_true", help="show each token's reconstruction error")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of failing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    texts = [*arguments.text, *read_files(arguments.file, arguments.lines)]
    if not texts:
        raise CommandError('no text; try: saeserve features "The cat sat on the mat."', exit_code=2)
    dictionaries = _dictionaries(arguments.dictionary, arguments.feature or [])
    with connected(arguments) as client:
        batches = list(in_batches(texts, client.server_info().limits))
        replies = client.extract_features_stream(
            batches, dictionaries, timeout_s=arguments.timeout * len(batches), **_options(arguments)
        )
        if arguments.json:
            print_json([_as_json(*each, arguments.aggregate) for each in _pairs(batches, replies)])
        else:
            _show(_pairs(batches, replies), len(texts), arguments.aggregate)
    return 0


def in_batches(texts: Sequence[str], limits: Limits) -> Iterator[list[str]]:
    """Texts in their order, as many in a call as the server's limits allow whatever their tokens are.

    A text has no more tokens than bytes. One that is too long stands alone, for the server to say so.
    """
    batch: list[str] = []
    size = 0
    for text in texts:
        # A limit of 0 is one that the server does not tell.
        tokens = min(len(text.encode()), limits.max_tokens_per_input or sys.maxsize)
        too_many = len(batch) >= (limits.max_inputs or sys.maxsize)
        if batch and (too_many or size + tokens > (limits.max_tokens_per_request or sys.maxsize)):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += tokens
    if batch:
        yield batch


def read_files(files: Sequence[str], lines: bool) -> Iterator[str]:
    for file in files:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"cannot read {file}: {error}") from error
        if lines:
            yield from (line for line in text.splitlines() if line.strip())
        else:
            yield text


def _dictionaries(named: list[str], features: list[FeatureName]) -> list[str] | None:
    """The dictionaries to read; None is all. Features are numbers of one dictionary."""
    owners = sorted({feature.dictionary for feature in features if feature.dictionary})
    if len({*owners, *(named if owners else [])}) > 1:
        raise CommandError(
            f"--feature names {', '.join(owners)}; one call shows features of one dictionary by number", exit_code=2
        )
    return named or owners or None


def _options(arguments: argparse.Namespace) -> ExtractOptions:
    options: ExtractOptions = {
        "aggregation": arguments.aggregate,
        "tokens": True,
        "reconstruction_error": arguments.reconstruction_error,
        "overflow": "truncate" if arguments.truncate else "error",
    }
    if arguments.feature:
        options["features"] = [feature.feature for feature in arguments.feature]
    elif arguments.threshold is not None:
        options["threshold"] = arguments.threshold
    else:
        options["top_k"] = DEFAULT_TOP_K if arguments.top_k is None else arguments.top_k
    return options


def _pairs(batches: Iterable[list[str]], replies: Iterable[Extraction]) -> Iterator[tuple[str, InputFeatures]]:
    for batch, reply in zip(batches, replies, strict=True):
        yield from zip(batch, reply.inputs, strict=True)


def _show(entries: Iterable[tuple[str, InputFeatures]], total: int, aggregation: str) -> None:
    console = Console(highlight=False, markup=False)
    for number, (_, entry) in enumerate(entries, 1):
        title = f"text {number} of {total}: " if total > 1 else ""
        dropped = f", {entry.truncated_tokens:,} more cut off" if entry.truncated_tokens else ""
        noun = "token" if entry.n_tokens == 1 else "tokens"
        for name, features in entry.dictionaries.items():
            how = "" if aggregation == "none" else f", {aggregation} over tokens"
            console.print(
                Text.assemble(title, (name, "bold cyan"), f"  {entry.n_tokens:,} {noun}{dropped}{how}"), end="\n\n"
            )
            if aggregation == "none":
                show_tokens(console, entry, features)
            else:
                show_aggregate(console, features.features)
            console.print()


def _as_json(text: str, entry: InputFeatures, aggregation: str) -> dict[str, Any]:
    assert entry.tokens is not None
    return {
        "text": text,
        "n_tokens": entry.n_tokens,
        "truncated_tokens": entry.truncated_tokens,
        "tokens": _tokens_as_json(entry.tokens),
        "aggregation": aggregation,
        "dictionaries": [_features_as_json(features) for features in entry.dictionaries.values()],
    }


def _tokens_as_json(tokens: Tokens) -> list[dict[str, Any]]:
    return [
        {
            "id": int(tokens.ids[i]),
            "piece": piece.decode("utf-8", errors="backslashreplace"),
            "bytes": [int(tokens.byte_starts[i]), int(tokens.byte_ends[i])],
            "characters": [int(tokens.char_starts[i]), int(tokens.char_ends[i])],
        }
        for i, piece in enumerate(tokens.pieces)
    ]


def _features_as_json(features: DictionaryFeatures) -> dict[str, Any]:
    rows = [
        [{"feature": int(f), "activation": float(v)} for f, v in zip(indices, values, strict=True)]
        for indices, values in features.features
    ]
    as_json: dict[str, Any] = {"dictionary": features.dictionary, "rows": rows}
    if features.reconstruction_error is not None:
        as_json["reconstruction_error"] = features.reconstruction_error
    return as_json
