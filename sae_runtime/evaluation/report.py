"""What an evaluation leaves behind: figures and explanations, and the files they are written to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_runtime.atomic import atomic_file
from sae_runtime.dictionary.manifest import Provenance
from sae_runtime.evaluation.n2g import Explanation
from sae_runtime.evaluation.plots import MissingPlotLibrary, draw_plots
from sae_runtime.figures.card import render_card

FIGURES_FILE = "evaluation.json"
EXPLANATIONS_FILE = "explanations.json"
CARD_FILE = "CARD.md"
PLOTS_FOLDER = "plots"


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Figures by their names (see figure_names.py): numbers, text, and lists of them; None where one is undefined."""

    figures: dict[str, Any]
    explanations: list[Explanation]
    token_text: Callable[[int], str]

    def to_json(self) -> str:
        """One flat object, keys in order of computation."""
        return json.dumps(self.figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def explanations_json(self) -> str:
        """A list with each explained latent, its n-grams as text (null for any token) and its counts."""
        listed = [
            {
                "latent": e.latent,
                "ngrams": [[None if t is None else self.token_text(t) for t in pattern] for pattern in e.patterns],
                "precision": e.precision,
                "recall": e.recall,
                "n_examples": e.n_examples,
                "n_unexplained": e.n_unexplained,
                "n_predicted": e.n_predicted,
                "n_active": e.n_active,
                "n_both": e.n_both,
            }
            for e in self.explanations
        ]
        return json.dumps(listed, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: Path, provenance: Provenance | None = None) -> None:
        """Writes evaluation.json, explanations.json, plots/*.png and CARD.md; each replaces an older one at once.

        Raises:
            MissingPlotLibrary: matplotlib is absent; the JSON files and a card without plots are there then.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / FIGURES_FILE, self.to_json().encode())
        _replace(folder / EXPLANATIONS_FILE, self.explanations_json().encode())
        missing: MissingPlotLibrary | None = None
        plots: list[str] = []
        try:
            (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
            for name, image in draw_plots(self.figures).items():
                _replace(folder / PLOTS_FOLDER / name, image)
                plots.append(f"{PLOTS_FOLDER}/{name}")
        except MissingPlotLibrary as error:
            missing = error
            if not any((folder / PLOTS_FOLDER).iterdir()):
                (folder / PLOTS_FOLDER).rmdir()
        shown = json.loads(self.explanations_json())
        card = render_card(self.figures, provenance=provenance, plots=plots, explanations=shown)
        _replace(folder / CARD_FILE, card.encode())
        if missing is not None:
            raise missing


def _replace(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)
