"""`saeserve catalogue build`: finds out what features mean; each field of CatalogueSettings is a flag."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from sae_runtime.catalogue.build import build_catalogue
from sae_runtime.catalogue.labels import find_label
from sae_runtime.catalogue.records import CatalogueInfo
from sae_runtime.catalogue.schema import CATALOGUE_FILE
from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.catalogue.vocabulary import Vocabulary
from sae_runtime.catalogue.write import write_catalogue
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats import check_backbone, load_dictionary
from sae_runtime.errors import DictionaryFormatError, FingerprintMismatch, UnknownDictionary
from sae_runtime.model.backbone import Backbone
from sae_runtime.settings import read_settings
from service.cli.parser import WRONG_USAGE, CommandError
from service.cli.setting_flags import add_setting_flags, given_settings, settings_errors
from service.cli.view.output import add_json_argument, open_console, print_json
from service.cli.view.progress import ProgressDisplay
from service.cli.view.tables import fact_table, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read text once and write what every feature of a dictionary does: contexts that lead back to their documents, "
        "firing rates, most active tokens, promoted tokens, neighbours, effects. Interrupted, the same command goes "
        "on. Settings come from a YAML file, flags of the same names, or both; flags win."
    )
    parser.add_argument("action", choices=["build"], help="build: read text and write the catalogue")
    parser.add_argument(
        "dictionary", metavar="DICTIONARY", help="a folder or file of any supported format, or a builtin name"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    add_json_argument(parser)
    add_setting_flags(parser, CatalogueSettings)


def run(arguments: argparse.Namespace) -> int:
    with settings_errors():
        settings = read_settings(CatalogueSettings, arguments.config, given_settings(arguments, CatalogueSettings))
    try:
        dictionary = load_dictionary(arguments.dictionary, device=settings.device)
        path = settings.out or _place(dictionary, arguments.dictionary)
        info = _build(dictionary, settings, path)
    except (OSError, ValueError, ImportError, UnknownDictionary, DictionaryFormatError, FingerprintMismatch) as error:
        raise CommandError(str(error)) from error
    if arguments.json:
        print_json(asdict(info) | {"path": str(path)})
    else:
        _print_summary(open_console(), info, path)
    return 0


def _place(dictionary: Dictionary, name: str) -> Path:
    if dictionary.folder is None or dictionary.manifest is None:
        raise CommandError(f"{name} is not a published dictionary; give --out, or publish it first", WRONG_USAGE)
    return dictionary.folder / CATALOGUE_FILE


def _build(dictionary: Dictionary, settings: CatalogueSettings, path: Path) -> CatalogueInfo:
    manifest = dictionary.manifest
    backbone = Backbone.load(
        settings.backbone or (manifest.backbone.name if manifest else "builtin"), device=settings.device
    )
    others = [load_dictionary(name, device=settings.device) for name in settings.neighbor_dictionaries]
    for loaded in (dictionary, *others):
        check_backbone(loaded, backbone)
    checkpoint = path.with_name(path.name + ".partial")
    tokenizer = backbone.text_tokenizer
    vocabulary = Vocabulary([tokenizer.token_bytes(token) for token in range(tokenizer.n_ids)])
    with ProgressDisplay(open_console(stderr=True)) as display:
        info, pages = build_catalogue(
            backbone,
            dictionary,
            settings,
            checkpoint,
            others={other.name: other for other in others},
            find_label=lambda examples, promoted: find_label(examples, vocabulary, promoted),
            progress=display.show,
        )
        write_catalogue(path, info, pages)
    checkpoint.unlink(missing_ok=True)
    return info


def _print_summary(console: Console, info: CatalogueInfo, path: Path) -> None:
    shares = {name: f"{share:.1%} of live features" for name, share in info.figures.items()}
    shares["dead"] = f"{info.figures['dead']:.1%} of all features"
    shares["median_token_r2"] = f"{info.figures['median_token_r2']:.2f}"
    facts = {"features": f"{info.n_latents:,}", "text": f"{info.n_tokens:,} tokens, {info.n_documents:,} documents"}
    print_table(console, fact_table(facts | {name.replace("_", " "): value for name, value in shares.items()}))
    console.print(f"Everything is in {path}", soft_wrap=True)
