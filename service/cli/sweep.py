"""`saeserve sweep`: trains a grid of dictionaries over n_latents and k, and fits the scaling law L(n, k)."""

from __future__ import annotations

import argparse

from rich.table import Column

from sae_runtime.errors import DictionaryFormatError
from sae_runtime.progress import ProgressCallback
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.sweep import PLOT, REPORT, SweepResult, run_sweep
from service.cli import train
from service.cli.parser import CommandError
from service.cli.view.output import open_console, print_json, print_sentence
from service.cli.view.progress import ProgressDisplay
from service.cli.view.tables import data_table, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    train.add_arguments(parser)
    parser.description = (
        "Train a dictionary for every pair of --grid-n-latents and --grid-k, measure each on held-out text, and fit "
        "L(n, k) = exp(alpha + beta_k log k + beta_n log n + gamma log k log n) + exp(zeta + eta log k) (Gao et al. "
        "2024) with confidence intervals. All else is as in `saeserve train`; --out is the folder of the sweep. The "
        "same command resumes an interrupted sweep."
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument("--grid-n-latents", type=_numbers, required=True, metavar="N,N,…", help="numbers of latents")
    grid.add_argument("--grid-k", type=_numbers, required=True, metavar="K,K,…", help="latents active on a token")


def _numbers(text: str) -> list[int]:
    try:
        values = [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1024,2048") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} contains a number below 1")
    return values


def run(arguments: argparse.Namespace) -> int:
    base = train.read_config(arguments)
    console = open_console(stderr=True)

    def begin(index: int, total: int, config: TrainingConfig) -> ProgressCallback:
        console.print(f"run {index + 1} of {total}: n_latents {config.n_latents}, k {config.k}")
        return ProgressDisplay(console).show

    try:
        result = run_sweep(base, arguments.grid_n_latents, arguments.grid_k, begin=begin)
    except KeyboardInterrupt:
        print_sentence(console, "Stopped. The same command resumes the run that was interrupted.")
        raise
    except (OSError, ValueError, FloatingPointError, ModuleNotFoundError, DictionaryFormatError) as error:
        raise CommandError(str(error)) from error
    if arguments.json:
        fit = None if result.fit is None else result.fit.to_json()
        points = [{"n_latents": p.n_latents, "k": p.k, "nmse": p.loss} for p in result.points]
        print_json({"points": points, "fit": fit, "no_fit_because": result.reason})
    else:
        _print(result, base)
    return 0


def _print(result: SweepResult, base: TrainingConfig) -> None:
    console = open_console()
    table = data_table(Column("latents", justify="right"), "k", "NMSE", "fitted", title="held-out NMSE")
    for point in result.points:
        fitted = "" if result.fit is None else f"{result.fit.loss(point.n_latents, point.k):.4f}"
        table.add_row(f"{point.n_latents:,}", str(point.k), f"{point.loss:.4f}", fitted)
    print_table(console, table)
    if result.fit is None:
        print_sentence(console, f"No fit: {result.reason}")
    else:
        law = data_table("parameter", "value", "95 % interval", title="L(n, k)")
        for name, value in result.fit.parameters.items():
            low, high = result.fit.intervals[name]
            law.add_row(name, f"{value:.3f}", f"{low:.3f} to {high:.3f}")
        print_table(console, law)
        console.print(f"R² of log NMSE {result.fit.r_squared:.4f}, residual {100 * result.fit.residual_std:.2f} %")
    plot = f" and {PLOT}" if (base.out / PLOT).exists() else ""
    console.print(f"Written: {REPORT}{plot} in {base.out}", soft_wrap=True)
