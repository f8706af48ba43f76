"""`saeserve evaluate`: measures a dictionary on held-out text; each field of EvaluationSettings is a flag."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.formats import check_backbone, load_dictionary
from sae_runtime.errors import DictionaryFormatError, FingerprintMismatch, UnknownDictionary
from sae_runtime.evaluation.evaluate import complete_settings, evaluate
from sae_runtime.evaluation.figure_names import describe
from sae_runtime.evaluation.plots import MissingPlotLibrary
from sae_runtime.evaluation.report import EvaluationReport
from sae_runtime.evaluation.settings import EvaluationSettings
from sae_runtime.model.backbone import Backbone
from sae_runtime.settings import read_settings
from service.cli.parser import WRONG_USAGE, CommandError
from service.cli.setting_flags import add_setting_flags, given_settings, settings_errors
from service.cli.view.output import add_json_argument, open_console, print_json, print_sentence
from service.cli.view.progress import ProgressDisplay
from service.cli.view.tables import fact_table, print_table

_SHOWN = (
    "nmse",
    "nmse_normalized",
    "relative_error",
    "variance_explained",
    "l0",
    "dead_fraction",
    "dense_fraction",
    "ce_clean",
    "ce_spliced",
    "ce_ablated",
    "delta_ce",
    "loss_recovered",
    "kl",
    "n_tokens",
    "baseline_pca_nmse",
    "baseline_random_nmse",
    "probe_loss_mean",
    "n2g_precision_mean",
    "n2g_recall_mean",
    "ablation_latent_sparsity_mean",
    "geometry_nearest_cosine_mean",
)
"""The figures that the terminal shows; the files hold all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a dictionary of any family on held-out text, and write evaluation.json, explanations.json, CARD.md "
        "and plots. Settings come from a YAML file, flags of the same names, or both; flags win."
    )
    parser.add_argument(
        "dictionary", metavar="DICTIONARY", help="a folder or file of any supported format, or a builtin name"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    add_json_argument(parser)
    add_setting_flags(parser, EvaluationSettings)


def run(arguments: argparse.Namespace) -> int:
    with settings_errors():
        settings = read_settings(EvaluationSettings, arguments.config, given_settings(arguments, EvaluationSettings))
    missing = [str(path) for path in settings.data if not path.exists()]
    if missing:  # before anything is loaded
        raise CommandError(f"no text file or token folder at {', '.join(missing)}")
    try:
        dictionary, report = _measure(arguments.dictionary, settings)
    except (OSError, ValueError, ImportError, UnknownDictionary, DictionaryFormatError, FingerprintMismatch) as error:
        raise CommandError(str(error)) from error
    out = settings.out or Path(f"{dictionary.name or Path(arguments.dictionary).stem}-evaluation")
    provenance = dictionary.manifest.provenance if dictionary.manifest else None
    code = 0
    try:
        report.write(out, provenance)
    except MissingPlotLibrary as error:
        print_sentence(open_console(stderr=True), f"saeserve: {error}")
        code = 1  # the plots are missing
    except OSError as error:
        raise CommandError(f"cannot write the report: {error}") from error
    if arguments.json:
        print_json({"dictionary": arguments.dictionary, "path": str(out), "figures": report.figures})
    else:
        _print_figures(open_console(), report.figures, out)
    return code


def _measure(name: str, settings: EvaluationSettings) -> tuple[Dictionary, EvaluationReport]:
    dictionary = load_dictionary(name, device=settings.device)
    if complete_settings(settings, dictionary).site is None:
        raise CommandError(f"{name} does not say which site it reads; give --site", WRONG_USAGE)
    manifest = dictionary.manifest
    backbone = Backbone.load(
        settings.backbone or (manifest.backbone.name if manifest else "builtin"), device=settings.device
    )
    check_backbone(dictionary, backbone)
    with ProgressDisplay(open_console(stderr=True)) as display:
        return dictionary, evaluate(backbone, dictionary, settings, display.show)


def _print_figures(console: Console, figures: dict[str, Any], out: Path) -> None:
    rows: dict[str, str | Text] = {}
    for name in _SHOWN:
        value = figures.get(name)
        if value is not None:
            figure = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            rows[name] = Text.assemble(f"{figure:>9}  ", (describe(name), "dim"))
    print_table(console, fact_table(rows))
    console.print(f"Everything is in {out}; start with CARD.md", soft_wrap=True)
