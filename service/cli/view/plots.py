"""Plots of measured effects, as PNG. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_runtime.evaluation.plots import MissingPlotLibrary
from service.client import AblationStudy, Attributions, Contrast, FeatureEffect, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 110
_BLUE, _ORANGE, _GREY = "#2a6f97", "#e07a2f", "#9a9a9a"
_MOST_BARS = 30
_MOST_CURVES = 8
_MOST_LABELLED = 80


def write_png(path: Path, draw: Callable[[Figure], None]) -> None:
    """Draws a figure and writes it.

    Raises:
        MissingPlotLibrary: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as MatplotlibFigure
    except ImportError as error:
        raise MissingPlotLibrary(
            "plots need matplotlib, which is not installed: pip install 'saeserve[evaluate]'"
        ) from error
    figure = MatplotlibFigure(figsize=(9, 5), layout="constrained", dpi=_DPI)
    draw(figure)
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.savefig(str(path), format="png", dpi=_DPI)


def draw_scores(figure: Figure, scores: Scores, pieces: Sequence[str]) -> None:
    """The first text: above, the loss of each token without and with edits; below, the KL of each prediction."""
    first = scores[0]
    edited = first.edited
    rows = figure.subplots(2 if edited is not None else 1, 1, sharex=True, squeeze=False)[:, 0]
    x = np.arange(1, len(first.unedited.loss) + 1)
    rows[0].plot(x, first.unedited.loss, color=_GREY, marker=".", label="unedited")
    rows[0].set_ylabel("loss of the token, nats")
    if edited is not None and first.kl is not None:
        rows[0].plot(x, edited.loss, color=_ORANGE, marker=".", label="edited")
        rows[0].legend()
        rows[1].bar(np.arange(len(first.kl)) + 1, first.kl, color=_BLUE)
        rows[1].set_ylabel("KL of the prediction, nats")
    if len(pieces) <= _MOST_LABELLED:
        rows[-1].set_xticks(np.arange(len(pieces)), pieces, rotation=90, fontsize=7, parse_math=False)
    title = f"first of {len(scores)} texts" if len(scores) > 1 else ""
    rows[0].set_title(title, fontsize=9)


def draw_ablation(figure: Figure, study: AblationStudy) -> None:
    """The change of the loss by feature with its interval; beside it, if it was measured, KL by distance."""
    effects = study.effects[:_MOST_BARS]
    with_distance = [effect for effect in study.effects if effect.by_distance][:_MOST_CURVES]
    axes = figure.subplots(1, 2 if with_distance else 1, squeeze=False)[0]
    y = np.arange(len(effects))[::-1]
    change = np.array([effect.everywhere.delta_loss for effect in effects])
    ends = np.array([effect.delta_loss_interval for effect in effects]).reshape(-1, 2)
    errors = np.clip(np.stack([change - ends[:, 0], ends[:, 1] - change]), 0, None)
    axes[0].barh(y, change, xerr=errors, color=_BLUE, ecolor=_GREY)
    axes[0].axvline(0, color="black", linewidth=0.6)
    axes[0].set_yticks(y, [_label(effect.feature, effect.ablation) for effect in effects], fontsize=7)
    axes[0].set_xlabel(f"change of the loss, nats a token, over {study.n_texts} texts (95 % interval)")
    if with_distance:
        for effect in with_distance:
            axes[1].plot(_log_distances(effect), [distance.figures.kl for distance in effect.by_distance], marker=".",
                         label=_label(effect.feature, effect.ablation))  # fmt: skip
        axes[1].set_xscale("log", base=2)
        ticks = max((_log_distances(effect) for effect in with_distance), key=len)
        axes[1].set_xticks(ticks, [str(int(tick)) if tick >= 1 else "0" for tick in ticks])
        axes[1].set_xlabel("tokens after the ablated one")
        axes[1].set_ylabel("KL, nats")
        axes[1].legend(fontsize=7)


def _log_distances(effect: FeatureEffect) -> list[float]:
    """The start of each bucket of distances, with 0 at 0.5, which a logarithmic axis can show."""
    return [max(distance.first, 0.5) for distance in effect.by_distance]


def draw_attributions(figure: Figure, result: Attributions) -> None:
    """Left: attribution and exact effect of the largest pairs. Right: one against the other, a point per pair."""
    left, right = figure.subplots(1, 2)
    estimate = np.array([pair.attribution for pair in result.attributions])
    effect = np.array([pair.effect for pair in result.attributions])
    largest = result.attributions[:_MOST_BARS]
    y = np.arange(len(largest))[::-1]
    left.barh(y + 0.2, estimate[: len(largest)], 0.4, color=_BLUE, label="activation x gradient")
    left.barh(y - 0.2, effect[: len(largest)], 0.4, color=_ORANGE, label="exact ablation")
    left.axvline(0, color="black", linewidth=0.6)
    left.set_yticks(y, [f"{_label(pair.feature)} @{pair.position}" for pair in largest], fontsize=7)
    left.set_xlabel("logit")
    left.legend(fontsize=7)
    right.scatter(estimate, effect, s=14, color=_BLUE)
    ends = [min(estimate.min(initial=0), effect.min(initial=0)), max(estimate.max(initial=0), effect.max(initial=0))]
    right.plot(ends, ends, color=_GREY, linewidth=0.8)
    right.set_xlabel("activation x gradient")
    right.set_ylabel("exact ablation")
    if result.pearson is not None and result.spearman is not None:
        right.set_title(f"Pearson {result.pearson:.2f}, Spearman {result.spearman:.2f}", fontsize=9)


def draw_contrast(figure: Figure, contrast: Contrast) -> None:
    """The AUC of each feature, with its q-value."""
    axes = figure.subplots()
    clearest = contrast.features[:_MOST_BARS]
    y = np.arange(len(clearest))[::-1]
    auc = np.array([feature.auc for feature in clearest])
    colors = [_ORANGE if value >= 0.5 else _BLUE for value in auc]
    axes.barh(y, auc - 0.5, left=0.5, color=colors)
    axes.set_yticks(y, [_label(feature.feature) for feature in clearest], fontsize=7)
    for height, feature in zip(y, clearest, strict=True):
        q_value = f"{feature.q_value:.1e}" if feature.q_value < 0.01 else f"{feature.q_value:.2f}"
        side = "right" if feature.auc >= 0.5 else "left"
        axes.text(0.5, height, f" q {q_value} ", ha=side, va="center", fontsize=6)
    axes.set_xlim(0, 1)
    axes.axvline(0.5, color="black", linewidth=0.6)
    axes.set_xlabel("AUC: 1 is always stronger in the first set, 0 in the second")


def _label(feature: tuple[str, int], ablation: str = "zero") -> str:
    return f"{feature[0]}:{feature[1]}{' (mean)' if ablation == 'mean' else ''}"
