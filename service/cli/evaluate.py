"""`saeserve evaluate`: measures a dictionary on held-out text, as its training run did."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

import sae_runtime.builtin
from sae_runtime.autoencoder import Dictionary
from sae_runtime.backbone import Backbone
from sae_runtime.errors import UnknownDictionary
from sae_runtime.evaluation.dictionary_evaluation import evaluate_dictionary
from sae_runtime.formats import check_backbone, load_dictionary
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.progress import ProgressMeter
from sae_runtime.training.run import held_out_rows
from service.cli.argument_types import natural
from service.cli.command_error import CommandError
from service.cli.json_output import print_json
from service.cli.train import ProgressDisplay, print_figures

# How its training run cut text into rows: figures are comparable only on rows of the same kind.
_ROW_SETTINGS = ("context_length", "rows", "prepend_end_of_text")

_BUILTIN_HELD_OUT = Path(sae_runtime.builtin.__file__).parent / "data" / "heldout.jsonl.xz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dictionary", metavar="DICTIONARY", help="a published folder, an OpenAI .pt file, or a builtin name"
    )
    parser.add_argument(
        "--held-out",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="held-out text: .txt, .md or .jsonl files, also .xz or .gz [what the builtin model was measured on]",
    )
    parser.add_argument(
        "--tokens", type=natural, default=131_072, metavar="N", help="tokens to measure, drawn from all files"
    )
    parser.add_argument(
        "--backbone", metavar="NAME", help="builtin, a Hugging Face folder or a hub name [as trained on]"
    )
    parser.add_argument("--site", metavar="SITE", help="where it is read, such as 8.resid_post_mlp [as trained on]")
    parser.add_argument("--device", default="cpu", help="device of the backbone and the dictionary")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="seed of the choice of text")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    held_out = arguments.held_out or [_BUILTIN_HELD_OUT]
    missing = [str(path) for path in held_out if not path.is_file()]
    if missing:
        raise CommandError(f"no text file at {', '.join(missing)}")
    try:
        figures = _measure(arguments, held_out)
    except (OSError, ValueError, UnknownDictionary) as error:
        raise CommandError(str(error)) from error
    if arguments.json:
        print_json({"dictionary": arguments.dictionary, "figures": figures})
    else:
        print_figures(Console(highlight=False), figures)
    return 0


def _measure(arguments: argparse.Namespace, held_out: list[Path]) -> dict[str, float]:
    dictionary = load_dictionary(arguments.dictionary, device=arguments.device)
    manifest = dictionary.manifest
    name = arguments.backbone or (manifest.backbone.name if manifest else "builtin")
    backbone = Backbone.load(name, device=arguments.device)
    check_backbone(dictionary, backbone)
    config = TrainingConfig(
        site=_site(arguments, dictionary),
        data=tuple(held_out),
        held_out=tuple(held_out),
        out=Path("unused"),
        seed=arguments.seed,
        **_row_settings(dictionary),
    )
    with ProgressDisplay(Console(stderr=True, highlight=False)) as display:
        meter = ProgressMeter(display.show, interval=0.5)
        meter.begin("evaluate", arguments.tokens)
        rows = held_out_rows(config, backbone, arguments.tokens)
        site = backbone.check_site(config.site)
        return evaluate_dictionary(backbone, dictionary, rows, site=site, progress=meter.reach).figures()


def _site(arguments: argparse.Namespace, dictionary: Dictionary) -> str:
    site = arguments.site or dictionary.site
    if site is None:
        raise CommandError(f"{arguments.dictionary} does not say where it is read; give --site", exit_code=2)
    return str(site)


def _row_settings(dictionary: Dictionary) -> dict[str, Any]:
    provenance = dictionary.manifest.provenance if dictionary.manifest else None
    config = provenance.config if provenance else {}
    return {name: config[name] for name in _ROW_SETTINGS if name in config}
