"""`saeserve evaluate`: measures a dictionary on held-out text; every field of EvaluationSettings is a flag."""

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
from service.cli.command_error import CommandError
from service.cli.job_progress import ProgressDisplay
from service.cli.json_output import print_json
from service.cli.setting_flags import add_setting_flags, given_settings, settings_errors
from service.cli.tables import fact_table, print_table

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
"""What the terminal shows; the files hold everything."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures a dictionary of any family on held-out text, and writes evaluation.json, explanations.json, CARD.md "
        "and plots. Settings come from a YAML file, flags of the same names, or both; flags win."
    )
    parser.add_argument(
        "dictionary", metavar="DICTIONARY", help="a folder or file of any supported format, or a builtin name"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    add_setting_flags(parser, EvaluationSettings)


def run(arguments: argparse.Namespace) -> int:
    with settings_errors():
        settings = read_settings(EvaluationSettings, arguments.config, given_settings(arguments, EvaluationSettings))
    missing = [str(path) for path in settings.data if not path.exists()]
    if missing:  # before anything is loaded
        raise CommandError(f"no text file or token folder at {', '.join(missing)}")
    try:
        dictionary, report = _measure(arguments.dictionary, settings)
    except (OSError, ValueError, UnknownDictionary, DictionaryFormatError, FingerprintMismatch) as error:
        raise CommandError(str(error)) from error
    out = settings.out or Path(f"{dictionary.name or Path(arguments.dictionary).stem}-evaluation")
    provenance = dictionary.manifest.provenance if dictionary.manifest else None
    console = Console(stderr=True, highlight=False, markup=False)
    code = 0
    try:
        report.write(out, provenance)
    except MissingPlotLibrary as error:
        console.print(f"saeserve: {error}", soft_wrap=True, markup=False)
        code = 1  # what was asked for is not all there
    except OSError as error:
        raise CommandError(f"cannot write the report: {error}") from error
    if arguments.json:
        print_json({"dictionary": arguments.dictionary, "path": str(out), "figures": report.figures})
    else:
        _print_figures(Console(highlight=False, markup=False), report.figures, out)
    return code


def _measure(name: str, settings: EvaluationSettings) -> tuple[Dictionary, EvaluationReport]:
    dictionary = load_dictionary(name, device=settings.device)
    if complete_settings(settings, dictionary).site is None:
        raise CommandError(f"{name} does not say where it is read; give --site", exit_code=2)
    manifest = dictionary.manifest
    backbone = Backbone.load(
        settings.backbone or (manifest.backbone.name if manifest else "builtin"), device=settings.device
    )
    check_backbone(dictionary, backbone)
    with ProgressDisplay(Console(stderr=True, highlight=False)) as display:
        return dictionary, evaluate(backbone, dictionary, settings, display.show)


def _print_figures(console: Console, figures: dict[str, Any], out: Path) -> None:
    rows: dict[str, str | Text] = {}
    for name in _SHOWN:
        value = figures.get(name)
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            rows[name] = Text.assemble(f"{shown:>9}  ", (describe(name), "dim"))
    print_table(console, fact_table(rows))
    console.print(f"Everything is in {out}; start with CARD.md", soft_wrap=True, markup=False)
