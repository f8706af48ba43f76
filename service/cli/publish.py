"""`saeserve publish`: writes a dictionary of any format as the published folder that the server loads."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sae_runtime.dictionary.formats import load_dictionary
from sae_runtime.dictionary.formats.published import STORED_DTYPES, read_statistics
from sae_runtime.dictionary.publish import publish
from sae_runtime.errors import DictionaryFormatError, UnknownDictionary
from sae_runtime.figures.statistics import measure_on_text
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from service.cli.command_error import CommandError
from service.cli.json_output import print_json
from service.cli.tables import fact_table, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a dictionary of any format (SAELens, sparsify, dictionary_learning, OpenAI or published) as a folder "
        "in the published form, for a backbone. With --data its latents are measured on text, which edits in multiples "
        "of a feature's maximum and ablation to the mean need."
    )
    parser.add_argument("dictionary", metavar="DICTIONARY", help="a folder or file of any format, or a builtin name")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--backbone", default="builtin", help="the model that it reads: builtin, a folder or a hub name"
    )
    parser.add_argument("--site", help="where it reads, such as 8.resid_post_mlp, if its file does not say")
    parser.add_argument("--name", help="name that it is served under, if not the file's")
    parser.add_argument("--dtype", choices=list(STORED_DTYPES), default="float32", help="of the stored weights")
    parser.add_argument(
        "--context-length", type=int, metavar="N", help="tokens per row in training, if its file does not say"
    )
    statistics = parser.add_mutually_exclusive_group()
    statistics.add_argument("--statistics", type=Path, metavar="FILE", help="a stats.safetensors to publish with it")
    statistics.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="text to measure its latents on (.txt, .jsonl, ...)"
    )
    parser.add_argument("--tokens", type=int, default=200_000, help="how many tokens of --data to measure on")
    parser.add_argument("--device", default="cpu", help="where to measure")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print what was published as JSON")


def run(arguments: argparse.Namespace) -> int:
    if arguments.tokens < 1:
        raise CommandError(f"--tokens is {arguments.tokens}, expected 1 or more", exit_code=2)
    try:
        dictionary = load_dictionary(arguments.dictionary, device=arguments.device)
        backbone = Backbone.load(arguments.backbone, device=arguments.device)
        placed = dictionary if arguments.site is None else replace(dictionary, site=str(Site.parse(arguments.site)))
        statistics = None
        if arguments.statistics is not None:
            statistics = read_statistics(arguments.statistics)
        elif arguments.data:
            statistics = measure_on_text(
                backbone, placed, arguments.data, arguments.tokens, context_length=arguments.context_length
            )
        manifest = publish(
            placed,
            arguments.out,
            backbone,
            name=arguments.name,
            dtype=arguments.dtype,
            context_length=arguments.context_length,
            statistics=statistics,
            overwrite=arguments.overwrite,
        )
    except (OSError, ValueError, DictionaryFormatError, UnknownDictionary) as error:
        raise CommandError(str(error)) from error
    measured = statistics or dictionary.statistics
    facts: dict[str, str] = {
        "name": manifest.name,
        "path": str(arguments.out),
        "backbone": manifest.backbone.name,
        "site": manifest.site,
        "architecture": manifest.architecture,
    }
    if arguments.json:
        print_json(
            facts
            | {"latents": manifest.n_latents, "statistics_tokens": None if measured is None else measured.n_tokens}
        )
        return 0
    facts["latents"] = f"{manifest.n_latents:,}"
    facts["statistics"] = "none" if measured is None else f"over {measured.n_tokens:,} tokens"
    print_table(Console(highlight=False, markup=False), fact_table(facts))
    return 0
