"""`saeserve catalogue`: finds out what features mean, and takes their labels in and out.

Each field of CatalogueSettings is a flag of `build`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from sae_runtime.atomic import atomic_file
from sae_runtime.catalogue.build import build_catalogue
from sae_runtime.catalogue.label_files import LabelFormat, read_labels, write_labels
from sae_runtime.catalogue.records import CatalogueInfo
from sae_runtime.catalogue.schema import CATALOGUE_FILE
from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.catalogue.write import write_catalogue
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats import check_backbone, load_dictionary
from sae_runtime.errors import CatalogueError, DictionaryFormatError, FingerprintMismatch, UnknownDictionary
from sae_runtime.model.backbone import Backbone
from sae_runtime.settings import read_settings
from service.catalogues import open_annotations
from service.cli.parser import WRONG_USAGE, CommandError
from service.cli.setting_flags import add_setting_flags, given_settings, settings_errors
from service.cli.view.output import add_json_argument, open_console, print_json, print_sentence
from service.cli.view.progress import ProgressDisplay
from service.cli.view.tables import fact_table, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read text once and write what every feature of a dictionary does: contexts that lead back to their documents, "
        "firing rates, most active tokens, promoted tokens, neighbours, effects, labels. Interrupted, the same command "
        "goes on. Settings come from a YAML file, flags of the same names, or both; flags win."
    )
    parser.add_argument(
        "action",
        choices=["build", "export", "import"],
        help="build: read text and write the catalogue; export, import: write all labels to a file, or read labels of "
        "people and models from it",
    )
    parser.add_argument(
        "dictionary", metavar="DICTIONARY", help="a folder or file of any supported format, or a builtin name"
    )
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="of export and import: .csv or .json, in Neuronpedia's form"
    )
    parser.add_argument(
        "--labels-dir", default="", metavar="FOLDER", help="of export and import: the server's setting labels_dir"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    add_json_argument(parser)
    add_setting_flags(parser, CatalogueSettings)


def run(arguments: argparse.Namespace) -> int:
    if arguments.action != "build":
        return _run_labels(arguments)
    if arguments.file is not None:
        raise CommandError("--file belongs to export and import", WRONG_USAGE)
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


def _run_labels(arguments: argparse.Namespace) -> int:
    file: Path | None = arguments.file
    if file is None or file.suffix not in (".csv", ".json"):
        raise CommandError(f"{arguments.action} needs --file FILE, which ends in .csv or .json", WRONG_USAGE)
    form: LabelFormat = "csv" if file.suffix == ".csv" else "json"
    try:
        dictionary = load_dictionary(arguments.dictionary)
        annotations = open_annotations({dictionary.name: dictionary}, arguments.labels_dir)[dictionary.name]
        if annotations.problem or annotations.written is None:
            raise CommandError(annotations.problem or "the file of labels cannot be used")
        if arguments.action == "export":
            labels = annotations.labels()
            manifest = dictionary.manifest
            backbone = manifest.backbone.name if manifest else ""
            with atomic_file(file) as stream:
                text = write_labels(labels, form, backbone=backbone, dictionary=dictionary.name)
                stream.write(text.encode())
            done = f"wrote {len(labels):,} labels to {file}"
        else:
            read = read_labels(file.read_text(encoding="utf-8-sig"), form, dictionary=dictionary.name)
            kept = [(feature, label) for feature, label in read if label.source != "rule"]
            dictionary.check_latents([feature for feature, _ in kept])
            replaced = sum(annotations.written.write(feature, label) is not None for feature, label in kept)
            done = (
                f"read {len(kept):,} labels, of which {replaced:,} replaced others; {len(read) - len(kept):,} of rules"
            )
            done += " were left out, which a catalogue makes itself"
    except (OSError, ValueError, CatalogueError, UnknownDictionary) as error:
        raise CommandError(f"{file}: {error}" if isinstance(error, UnicodeDecodeError) else str(error)) from error
    print_sentence(open_console(), done)
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
    with ProgressDisplay(open_console(stderr=True)) as display:
        info, pages = build_catalogue(
            backbone,
            dictionary,
            settings,
            checkpoint,
            others={other.name: other for other in others},
            progress=display.show,
        )
        write_catalogue(path, info, pages)
    checkpoint.unlink(missing_ok=True)
    return info


def _print_summary(console: Console, info: CatalogueInfo, path: Path) -> None:
    shares = {name: f"{share:.1%} of live features" for name, share in info.figures.items()}
    shares["dead"] = f"{info.figures['dead']:.1%} of all features"
    for name in ("median_token_r2", "label_precision"):
        shares[name] = f"{info.figures[name]:.2f}"
    facts = {"features": f"{info.n_latents:,}", "text": f"{info.n_tokens:,} tokens, {info.n_documents:,} documents"}
    print_table(console, fact_table(facts | {name.replace("_", " "): value for name, value in shares.items()}))
    console.print(f"Everything is in {path}", soft_wrap=True)
