"""`saeserve dictionaries`: the dictionaries of a server, or one of them in full."""

from __future__ import annotations

import argparse
import json

from rich.table import Column, Table

from service.cli.connection import add_connection_arguments, connected
from service.cli.view.output import add_json_argument, open_console, print_json
from service.cli.view.tables import data_table, fact_table, print_table, printable
from service.client import DictionaryDetails, DictionaryInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show how this dictionary was made, and its figures")
    add_json_argument(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        reply = client.get_dictionary(arguments.name) if arguments.name else client.list_dictionaries()
    if arguments.json:
        print_json(reply)
    else:
        table = _details(reply) if isinstance(reply, DictionaryDetails) else _list(reply)
        print_table(open_console(), table)
    return 0


def _list(dictionaries: tuple[DictionaryInfo, ...]) -> Table:
    table = data_table("dictionary", Column("site"), "latents", "width", Column("activation"), Column("statistics"))
    for dictionary in dictionaries:
        table.add_row(
            dictionary.name,
            dictionary.site,
            f"{dictionary.n_latents:,}",
            f"{dictionary.d_in:,}",
            _activation(dictionary),
            "yes" if dictionary.has_statistics else "no",
        )
    return table


_INPUT = {
    "none": "as it is",
    "centred": "mean 0 per token",
    "layer_norm": "mean 0 and standard deviation 1 per token",
    "constant_norm": "constant norm per token",
}


def _details(details: DictionaryDetails) -> Table:
    dictionary, provenance = details.dictionary, details.provenance
    facts = {
        "name": dictionary.name,
        "site": dictionary.site,
        "latents": f"{dictionary.n_latents:,} over width {dictionary.d_in:,}",
        "activation": _activation(dictionary),
        "input": _INPUT.get(dictionary.normalization, dictionary.normalization),
        "statistics": "yes"
        if dictionary.has_statistics
        else "no (so no edits in multiples of the maximum, or to the mean)",
    }
    if dictionary.fingerprint:
        facts["fingerprint"] = dictionary.fingerprint
    if (catalogue := details.catalogue) is not None:
        sources = ", ".join(map(printable, catalogue.sources))
        facts["catalogue"] = f"{catalogue.n_tokens:,} tokens of {sources}, built {catalogue.created}"
    elif dictionary.fingerprint:
        facts["catalogue"] = f"none; `saeserve catalogue build {dictionary.name} --data TEXT` builds one"
    if details.hidden_labels:
        facts["hidden labels"] = f"{details.hidden_labels:,} were written for another version of it; kept, not shown"
    if dictionary.context_length:
        facts["context"] = f"{dictionary.context_length:,} tokens"
    if provenance is not None:
        if provenance.config.get("prepend_bos"):
            facts["training text"] = "every row began with a BOS token; texts are run without one"
        facts |= {
            "trained on": f"{provenance.tokens:,} tokens of {provenance.data or 'unnamed text'}",
            "trained by": f"{provenance.code_version}, seed {provenance.seed}",
            "published": f"{provenance.created:%Y-%m-%d %H:%M} UTC" if provenance.created else "not recorded",
        }
    facts |= {name: f"{value:.6g}" for name, value in sorted(details.evaluation.items())}
    if provenance is not None and provenance.config:
        facts["config"] = json.dumps(provenance.config)
    return fact_table(facts)


def _activation(dictionary: DictionaryInfo) -> str:
    return f"{dictionary.architecture}, k {dictionary.k}" if dictionary.k else dictionary.architecture
