"""`saeserve export`: writes a dictionary in another project's format."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_runtime.dictionary.formats import load_dictionary
from sae_runtime.dictionary.formats.openai import save_openai
from sae_runtime.dictionary.formats.saelens import save_saelens
from sae_runtime.errors import UnknownDictionary
from service.cli.parser import CommandError

_WRITERS = {"openai": save_openai, "saelens": save_saelens}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a dictionary in another project's format, in float32: openai is one .pt file (topk with layer norm, or "
        "relu), saelens a folder (every family but groupmax). A dictionary that the format cannot express is an error."
    )
    parser.add_argument("dictionary", metavar="DICTIONARY", help="a folder or file of any format, or a builtin name")
    parser.add_argument("--format", choices=sorted(_WRITERS), required=True, help="the format to write")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file (openai) or folder (saelens) to write")


def run(arguments: argparse.Namespace) -> int:
    if arguments.out.exists():
        raise CommandError(f"{arguments.out} exists; remove it first")
    try:
        dictionary = load_dictionary(arguments.dictionary)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[arguments.format](dictionary, arguments.out)
    except (OSError, ValueError, UnknownDictionary) as error:
        raise CommandError(str(error)) from error
    print(f"wrote {arguments.out} ({arguments.format}, {dictionary.activation}, {dictionary.n_latents:,} latents)")
    return 0
