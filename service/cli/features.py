"""`saeserve features`: which features fire on a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from sae_runtime.dictionary.ranking import Ranking
from service.cli.connection import add_connection_arguments, connected
from service.cli.feature_names import FeatureName, add_dictionaries_argument, feature_name
from service.cli.parser import WRONG_USAGE, CommandError, natural
from service.cli.ranking import add_ranking_argument, chosen_ranking, name_of
from service.cli.text_arguments import add_text_arguments, read_texts
from service.cli.view.output import add_json_argument, open_console, print_json
from service.cli.view.tokens import show_aggregate, show_tokens
from service.client import DictionaryFeatures, Extraction, InputFeatures, Limits, Tokens
from service.client.options import ExtractOptions
from service.client.results import Labels

DEFAULT_TOP_K = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_arguments(parser)
    add_dictionaries_argument(parser)
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument(
        "--top-k", type=natural, metavar="K", help=f"show the first K features of each token [{DEFAULT_TOP_K}]"
    )
    selection.add_argument("--threshold", type=float, metavar="A", help="show features with an activation above A")
    selection.add_argument(
        "--feature",
        action="append",
        type=feature_name,
        metavar="[NAME:]FEATURE",
        help="show only this feature (can be repeated)",
    )
    add_ranking_argument(parser)
    parser.add_argument(
        "--aggregate",
        choices=("none", "max", "mean", "sum", "last"),
        default="none",
        help="how to combine the tokens of a text",
    )
    parser.add_argument("--reconstruction-error", action="store_true", help="show each token's reconstruction error")
    add_json_argument(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    texts = read_texts(arguments, "features")
    dictionaries = _dictionaries(arguments.dictionary, arguments.feature or [])
    with connected(arguments) as client:
        batches = list(in_batches(texts, client.server_info().limits))
        ranking = chosen_ranking(arguments.rank_by, dictionaries, client)
        replies = client.extract_features_stream(
            batches, dictionaries, timeout_s=arguments.timeout * len(batches), **_options(arguments, ranking)
        )
        if arguments.json:
            print_json([_as_json(*reply, arguments.aggregate) for reply in _pairs(batches, replies)])
        else:
            _show(_pairs(batches, replies), len(texts), arguments.aggregate, ranking)
    return 0


def in_batches(texts: Sequence[str], limits: Limits) -> Iterator[list[str]]:
    """Texts in their order, in calls that keep to the server's limits.

    A text's number of tokens is not known here, but it has no more tokens than bytes. A text that is too long is a
    batch by itself, and the server says what is wrong with it.
    """
    batch: list[str] = []
    size = 0
    for text in texts:
        # A limit is 0 where the server does not state it.
        tokens = min(len(text.encode()), limits.max_tokens_per_input or sys.maxsize)
        too_many = len(batch) >= (limits.max_inputs or sys.maxsize)
        if batch and (too_many or size + tokens > (limits.max_tokens_per_request or sys.maxsize)):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += tokens
    if batch:
        yield batch


def _dictionaries(named: list[str], features: list[FeatureName]) -> list[str] | None:
    """The dictionaries to read, or None for all: those of --dictionary, or the one that --feature names.

    Raises:
        CommandError: --feature names a dictionary, and the command line names another as well.
    """
    of_features = sorted({feature.dictionary for feature in features if feature.dictionary})
    if of_features and len({*of_features, *named}) > 1:
        raise CommandError(
            f"--feature names {', '.join(of_features)}; one call shows single features of one dictionary", WRONG_USAGE
        )
    return named or of_features or None


def _options(arguments: argparse.Namespace, ranking: Ranking) -> ExtractOptions:
    options: ExtractOptions = {
        "rank_by": ranking,
        "aggregation": arguments.aggregate,
        "tokens": True,
        "labels": True,
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


def _pairs(batches: Iterable[list[str]], replies: Iterable[Extraction]) -> Iterator[tuple[str, InputFeatures, Labels]]:
    """Every text with its features, and the labels of all features of its batch."""
    for batch, reply in zip(batches, replies, strict=True):
        for text, entry in zip(batch, reply.inputs, strict=True):
            yield text, entry, reply.labels


def _show(replies: Iterable[tuple[str, InputFeatures, Labels]], total: int, aggregation: str, ranking: Ranking) -> None:
    console = open_console()
    for number, (_, entry, labels) in enumerate(replies, 1):
        title = f"text {number} of {total}: " if total > 1 else ""
        dropped = f" ({entry.truncated_tokens:,} more were cut off)" if entry.truncated_tokens else ""
        noun = "token" if entry.n_tokens == 1 else "tokens"
        for name, features in entry.dictionaries.items():
            how = "" if aggregation == "none" else f", {aggregation} over tokens"
            how += "" if ranking == "activation" else f", by {name_of(ranking)}"
            console.print(
                Text.assemble(title, (name, "bold cyan"), f"  {entry.n_tokens:,} {noun}{dropped}{how}"),
                end="\n\n",
            )
            if aggregation == "none":
                show_tokens(console, entry, features, labels.get(name, {}))
            else:
                show_aggregate(console, features.features, labels.get(name, {}))
            console.print()


def _as_json(text: str, entry: InputFeatures, labels: Labels, aggregation: str) -> dict[str, Any]:
    assert entry.tokens is not None
    return {
        "text": text,
        "n_tokens": entry.n_tokens,
        "truncated_tokens": entry.truncated_tokens,
        "tokens": _tokens_as_json(entry.tokens),
        "aggregation": aggregation,
        "dictionaries": [
            _features_as_json(features, labels.get(name, {})) for name, features in entry.dictionaries.items()
        ],
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


def _features_as_json(features: DictionaryFeatures, labels: Mapping[int, str]) -> dict[str, Any]:
    rows = [
        [{"feature": int(f), "activation": float(v)} for f, v in zip(indices, values, strict=True)]
        for indices, values in features.features
    ]
    as_json: dict[str, Any] = {"dictionary": features.dictionary, "rows": rows}
    if named := {int(f): labels[int(f)] for f in features.features.indices if int(f) in labels}:
        as_json["labels"] = named
    if features.reconstruction_error is not None:
        as_json["reconstruction_error"] = features.reconstruction_error
    return as_json
