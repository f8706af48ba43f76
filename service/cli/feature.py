"""`saeserve feature`: what a feature means, as a page in the terminal; and writes what a person says it means."""

from __future__ import annotations

import argparse

from service.cli.connection import add_connection_arguments, connected
from service.cli.feature_names import FeatureName, dictionary_of, feature_name
from service.cli.parser import WRONG_USAGE, CommandError, natural
from service.cli.view.feature_page import show_page
from service.cli.view.output import add_json_argument, open_console, print_json, print_sentence
from service.cli.view.tables import printable
from service.client import Client

DEFAULT_CONTEXTS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("feature", type=feature_name, metavar="[NAME:]FEATURE", help="such as resid-mid:12")
    parser.add_argument("--dictionary", metavar="NAME", help="the dictionary, if FEATURE does not name it")
    parser.add_argument(
        "--contexts",
        type=natural,
        default=DEFAULT_CONTEXTS,
        metavar="N",
        help="show N of the strongest contexts, and as many of weaker activations",
    )
    parser.add_argument("--label", metavar="TEXT", help='write what the feature means; "" removes what was written')
    parser.add_argument("--author", default="", metavar="NAME", help="who writes the label")
    add_json_argument(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.author and arguments.label is None:
        raise CommandError("--author belongs to --label TEXT", WRONG_USAGE)
    with connected(arguments) as client:
        name: FeatureName = arguments.feature
        dictionary = dictionary_of(name, arguments.dictionary, client)
        if arguments.label is not None:
            _write_label(arguments, dictionary, client)
            return 0
        details = client.get_feature(dictionary, name.feature)
    if arguments.json:
        print_json(details)
    else:
        show_page(open_console(), dictionary, details.page, arguments.contexts)
    return 0


def _write_label(arguments: argparse.Namespace, dictionary: str, client: Client) -> None:
    feature = arguments.feature.feature
    replaced = client.label_feature(dictionary, feature, arguments.label, author=arguments.author)
    if arguments.json:
        print_json({"dictionary": dictionary, "feature": feature, "label": arguments.label, "replaced": replaced})
        return
    name = f"{dictionary}:{feature}"
    before = "" if replaced is None else repr(replaced.text) + (f" of {replaced.author}" if replaced.author else "")
    if arguments.label:
        sentence = f"{name} is labelled {arguments.label!r}" + (f", in place of {before}" if before else "")
    else:
        sentence = f"{name}: removed the label {before}" if before else f"{name} had no label of a person"
    print_sentence(open_console(), printable(sentence))
