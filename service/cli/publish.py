"""`saeserve publish`: writes a dictionary of any format as the published folder that the server loads."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

from sae_runtime.builtin import HELD_OUT
from sae_runtime.data.bad_documents import BadDocuments
from sae_runtime.data.text_sample import read_sample
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats import check_backbone, load_dictionary
from sae_runtime.dictionary.formats.published import STORED_DTYPES, read_statistics
from sae_runtime.dictionary.publish import publish
from sae_runtime.errors import DictionaryFormatError, UnknownDictionary
from sae_runtime.figures.held_out import held_out_figures
from sae_runtime.figures.statistics import measure_on_text
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from service.cli.parser import WRONG_USAGE, CommandError
from service.cli.view.output import add_json_argument, open_console, print_json
from service.cli.view.tables import fact_table, print_table

_FIT_TOKENS = 8_192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a dictionary of any format (SAELens, sparsify, dictionary_learning, OpenAI or published) as a published "
        "folder, for one backbone. With --data, also measure its latents on text: edits in multiples of a feature's "
        "maximum and ablation to the mean need these statistics. The command always shows how well the dictionary "
        "reconstructs the backbone's activations, which reveals a dictionary made for another model, site or input "
        "scale."
    )
    parser.add_argument("dictionary", metavar="DICTIONARY", help="a folder or file of any format, or a builtin name")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--backbone", metavar="MODEL", default="builtin", help="model that it reads: builtin, a folder or a hub name"
    )
    parser.add_argument(
        "--site", metavar="SITE", help="site that it reads, such as 8.resid_post_mlp, if its file does not say"
    )
    parser.add_argument("--name", metavar="NAME", help="name to serve it under [the file's]")
    parser.add_argument("--dtype", choices=list(STORED_DTYPES), default="float32", help="type of the stored weights")
    parser.add_argument(
        "--context-length", type=int, metavar="N", help="tokens in a row of its training, if its file does not say"
    )
    statistics = parser.add_mutually_exclusive_group()
    statistics.add_argument("--statistics", type=Path, metavar="FILE", help="publish it with this stats.safetensors")
    statistics.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="measure its latents on this text (.txt, .jsonl, ...)"
    )
    parser.add_argument(
        "--bad-documents",
        choices=("stop", "skip"),
        default="stop",
        help="what to do at a document of --data that cannot be read or tokenized; what is skipped is told at the end",
    )
    parser.add_argument("--tokens", type=int, metavar="N", default=200_000, help="measure on N tokens of --data")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="device to measure on")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.tokens < 1:
        raise CommandError(f"--tokens is {arguments.tokens}, expected 1 or more", WRONG_USAGE)
    if arguments.out.exists() and not arguments.overwrite:  # before anything is measured
        raise CommandError(f"{arguments.out} exists; choose another folder, or give --overwrite")
    try:
        dictionary = load_dictionary(arguments.dictionary, device=arguments.device)
        backbone = Backbone.load(arguments.backbone, device=arguments.device)
        placed = dictionary if arguments.site is None else replace(dictionary, site=str(Site.parse(arguments.site)))
        check_backbone(placed, backbone)
        with BadDocuments(arguments.bad_documents) as bad:
            fit, warnings = _check_fit(placed, backbone, bad, arguments)
            statistics = None
            if arguments.statistics is not None:
                statistics = read_statistics(arguments.statistics)
            elif arguments.data:
                length = arguments.context_length
                statistics = measure_on_text(
                    backbone, placed, arguments.data, arguments.tokens, context_length=length, bad=bad
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
    except (OSError, ValueError, ImportError, DictionaryFormatError, UnknownDictionary) as error:
        raise CommandError(str(error)) from error
    for warning in warnings:
        print(f"saeserve: warning: {warning}", file=sys.stderr)
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
            | {"fit": fit or None}
        )
        return 0
    facts["latents"] = f"{manifest.n_latents:,}"
    if fit:
        facts["NMSE"] = f"{fit['nmse']:.4f} over {fit['n_tokens']:,.0f} tokens (1 is predicting the mean)"
        facts["L0"] = f"{fit['l0']:.1f} active latents per token"
    facts["statistics"] = "none" if measured is None else f"over {measured.n_tokens:,} tokens"
    print_table(open_console(), fact_table(facts))
    return 0


def _check_fit(
    dictionary: Dictionary, backbone: Backbone, bad: BadDocuments, arguments: argparse.Namespace
) -> tuple[dict[str, float], list[str]]:
    """Held-out figures of how well the dictionary fits the backbone (empty if unknown), and warnings."""
    warnings = []
    origin = dictionary.origin
    if origin is not None and origin.model and _plain_name(origin.model) != _plain_name(backbone.name):
        warnings.append(f"the file says that it was made for {origin.model}; the backbone is {backbone.name}")
    if dictionary.site is None or dictionary.transcoder:
        return {}, warnings  # publishing fails without a site; a transcoder does not reconstruct what it reads
    recorded = origin.context_length if origin is not None else None
    length = min(arguments.context_length or recorded or backbone.context_length, backbone.context_length)
    try:
        sample = read_sample(backbone, arguments.data or [HELD_OUT], _FIT_TOKENS, context_length=length, bad=bad)
        figures = held_out_figures(backbone, dictionary, sample.rows)
    except ValueError as error:
        return {}, [*warnings, f"the reconstruction cannot be measured: {error}"]
    fit = {str(name): figures[name] for name in ("nmse", "l0", "loss_recovered", "n_tokens") if name in figures}
    nmse = fit.get("nmse", math.inf)  # undefined where all activations are equal
    if not nmse < 1:
        warnings.append(
            f"the NMSE is {nmse:.2f}, which is worse than predicting the mean activation: the dictionary seems to "
            f"belong to another model, another site than {dictionary.site}, or inputs of another scale"
        )
    return fit, warnings


def _plain_name(model: str) -> str:
    """A model's name without its owner, and with one spelling of GPT-2 small."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    return "gpt2" if name == "gpt2-small" else name
