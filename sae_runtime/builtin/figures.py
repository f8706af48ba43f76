"""Recomputes the figures of the builtin backbone and its dictionaries on the held-out text beside this file.

    python -m sae_runtime.builtin.figures            # tables
    python -m sae_runtime.builtin.figures --json

Held-out documents are in no training file. They are whole books, whole chapters in every language, and so on
(data/README.md).
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sae_runtime import Backbone, load_dictionary
from sae_runtime.builtin import HELD_OUT
from sae_runtime.data.documents import read_documents
from sae_runtime.dictionary.formats import list_builtin_dictionaries
from sae_runtime.evaluation.bits_per_byte import bits_per_byte
from sae_runtime.figures.held_out import held_out_figures
from sae_runtime.training.activations.run_rows import held_out_rows
from sae_runtime.training.config import TrainingConfig

SHOWN = ("nmse", "relative_error", "nmse_normalized", "l0", "dead_fraction", "loss_recovered")


def backbone_figures() -> dict[str, float]:
    """Held-out bits per byte for each kind of text."""
    return bits_per_byte(Backbone.load("builtin"), read_documents([HELD_OUT]))


def dictionary_figures(name: str) -> dict[str, float]:
    """Held-out figures of one builtin dictionary, on the same rows as those in its manifest."""
    dictionary = load_dictionary(name)
    assert dictionary.manifest is not None
    settings = dictionary.manifest.provenance.config | {
        "data": [HELD_OUT],
        "held_out": [HELD_OUT],
        "out": Path("not-written"),
        "backbone": "builtin",
    }
    config = TrainingConfig.model_validate(settings)
    backbone = Backbone.load("builtin")
    return held_out_figures(backbone, dictionary, held_out_rows(config, backbone, config.evaluation_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    as_json = parser.parse_args().json
    bits = backbone_figures()
    dictionaries = {name: dictionary_figures(name) for name in list_builtin_dictionaries()}
    if as_json:
        print(json.dumps({"bits_per_byte": bits, "dictionaries": dictionaries}, indent=1))
        return
    console = Console()
    table = Table("kind of text", "bits per byte", title="builtin backbone, held-out text")
    for kind, value in bits.items():
        table.add_row(kind, f"{value:.3f}")
    console.print(table)
    table = Table("dictionary", "site", *SHOWN, title="builtin dictionaries, held-out text")
    for name, figures in dictionaries.items():
        table.add_row(name, load_dictionary(name).site, *(f"{figures[key]:.3f}" for key in SHOWN))
    console.print(table)


if __name__ == "__main__":
    main()
