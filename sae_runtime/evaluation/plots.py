"""Pictures of an evaluation's figures, as PNG; the one place that needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 80
_COLORS_KEPT = 48
_BLUE, _ORANGE, _GREEN, _GREY = "#2a6f97", "#e07a2f", "#5a9a4b", "#9a9a9a"
_COLORS = {"dictionary": _BLUE, "pca": _ORANGE, "random": _GREEN, "mean": _GREY}


class MissingPlotLibrary(ImportError):
    """matplotlib is absent; the message names the extra that brings it."""


def draw_plots(figures: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG pictures by file name, of the figures that are given.

    Raises:
        MissingPlotLibrary: matplotlib cannot be imported.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image  # comes with matplotlib
    except ImportError as error:
        raise MissingPlotLibrary(
            "plots need matplotlib, which is not installed: pip install 'saeserve[evaluate]'"
        ) from error
    pages: dict[str, list[tuple[str, Callable[[Axes, Mapping[str, Any]], None]]]] = {
        "reconstruction.png": [
            ("baseline_n_tokens", _draw_baselines),
            ("position_start", _draw_positions),
            ("kinds", _draw_kinds),
        ],
        "latents.png": [
            ("density_counts", _draw_densities),
            ("l0_histogram_counts", _draw_l0),
            ("geometry_histogram_counts", _draw_geometry),
        ],
        "interpretability.png": [
            ("probe_tasks", _draw_probes),
            ("n2g_latents", _draw_n2g),
            ("ablation_latent_counts", _draw_ablation),
        ],
    }
    pictures = {}
    for name, panels in pages.items():
        shown = [draw for key, draw in panels if figures.get(key)]
        if not shown:
            continue
        tall = name == "interpretability.png" and len(figures.get("probe_tasks", ())) > 12
        figure = Figure(figsize=(4.3 * len(shown), 5.2 if tall else 3.4), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            draw(axes, figures)
            axes.spines[["top", "right"]].set_visible(False)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # type: ignore[no-untyped-call]
        # A palette of few colours makes the file a third as large, and a card with its plots small enough to publish.
        pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
        image = Image.fromarray(pixels).convert("RGB").quantize(_COLORS_KEPT, dither=Image.Dither.NONE)
        stream = io.BytesIO()
        image.save(stream, "PNG", optimize=True)
        pictures[name] = stream.getvalue()
    return pictures


def _draw_baselines(axes: Axes, f: Mapping[str, Any]) -> None:
    names = [name for name in _COLORS if f.get(f"baseline_{name}_nmse") is not None]
    for offset, (key, label) in enumerate((("nmse", "NMSE"), ("loss_recovered", "loss recovered"))):
        for i, name in enumerate(names):
            value = f[f"baseline_{name}_{key}"] or 0.0
            x = offset * (len(names) + 1) + i
            axes.bar(x, value, color=_COLORS[name], label=_baseline_label(name, f) if offset == 0 else None)
            axes.annotate(f"{value:.3f}", (x, max(value, 0)), ha="center", va="bottom", fontsize=7)
        axes.text(
            offset * (len(names) + 1) + (len(names) - 1) / 2,
            -0.1,
            label,
            ha="center",
            va="top",
            transform=axes.get_xaxis_transform(),
        )
    axes.set_xticks([])
    axes.set_ylim(top=1.35)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    axes.set_title("against baselines", fontsize=10)


def _baseline_label(name: str, f: Mapping[str, Any]) -> str:
    return f"PCA, {f['baseline_pca_components']} components" if name == "pca" else name


def _draw_positions(axes: Axes, f: Mapping[str, Any]) -> None:
    places = range(len(f["position_start"]))
    for key, label, color in (
        ("delta_ce", "ΔCE, nats", _ORANGE),
        ("kl", "KL, nats", _GREEN),
        ("nmse", "NMSE", _BLUE),
    ):
        values = [math.nan if value is None else value for value in f[f"position_{key}"]]
        axes.plot(places, values, marker="o", markersize=3, color=color, label=label)
    spans = zip(f["position_start"], f["position_end"], strict=True)
    axes.set_xticks(list(places), [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in spans], rotation=60, fontsize=7)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_xlabel("position in the row")
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("by position, all tokens spliced", fontsize=10)


def _draw_kinds(axes: Axes, f: Mapping[str, Any]) -> None:
    places = range(len(f["kinds"]))
    for shift, (key, label, color) in enumerate(
        (("nmse", "NMSE", _BLUE), ("delta_ce", "ΔCE, nats", _ORANGE), ("kl", "KL, nats", _GREEN))
    ):
        values = [f[f"kind_{kind}_{key}"] or 0.0 for kind in f["kinds"]]
        axes.bar([p + 0.27 * (shift - 1) for p in places], values, width=0.25, color=color, label=label)
    axes.set_xticks(list(places), f["kinds"], rotation=30 if len(f["kinds"]) > 4 else 0, fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("by kind of text", fontsize=10)


def _draw_densities(axes: Axes, f: Mapping[str, Any]) -> None:
    axes.stairs(f["density_counts"], f["density_log10_edges"], fill=True, color=_BLUE)
    axes.axvline(-1, color=_GREY, linewidth=0.8, linestyle="--")
    axes.set_xlabel("log10 of the share of tokens")
    axes.set_ylabel("latents")
    dead, dense = f["feature_dead_fraction"], f["feature_dense_fraction"]
    axes.set_title(f"density; {dead:.1%} never, {dense:.1%} above 0.1", fontsize=10)


def _draw_l0(axes: Axes, f: Mapping[str, Any]) -> None:
    axes.stairs(f["l0_histogram_counts"], f["l0_histogram_edges"], fill=True, color=_BLUE)
    axes.set_xlabel("active latents")
    axes.set_ylabel("tokens")
    axes.set_title(f"L0, mean {f['feature_l0_mean']:.1f}", fontsize=10)


def _draw_geometry(axes: Axes, f: Mapping[str, Any]) -> None:
    edges = f["geometry_histogram_edges"]
    axes.stairs(f["geometry_histogram_counts"], edges, fill=True, color=_BLUE, label="decoder")
    axes.stairs(f["geometry_random_histogram_counts"], edges, color=_ORANGE, label="random directions")
    axes.set_xlabel("cosine of the nearest neighbour")
    axes.set_ylabel("latents")
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("decoder geometry", fontsize=10)


def _draw_probes(axes: Axes, f: Mapping[str, Any]) -> None:
    tasks = sorted(f["probe_tasks"], key=lambda task: -float(f[f"probe_{task}_loss"]))
    for key, label, color, marker in (
        ("random_latent_loss", "best random latent", _GREEN, "x"),
        ("neuron_loss", "best coordinate", _ORANGE, "+"),
        ("loss", "best latent", _BLUE, "o"),
    ):
        losses = [f[f"probe_{task}_{key}"] for task in tasks]
        axes.scatter(losses, range(len(tasks)), color=color, marker=marker, s=16, label=label)
    axes.axvline(math.log(2), color=_GREY, linewidth=0.8, linestyle="--", label="chance")
    axes.set_yticks(range(len(tasks)), tasks, fontsize=6.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("held-out loss, nats")
    axes.legend(fontsize=6.5, frameon=False)
    axes.set_title("probes on one latent", fontsize=10)


def _draw_n2g(axes: Axes, f: Mapping[str, Any]) -> None:
    points = [(r, p) for r, p in zip(f["n2g_recall"], f["n2g_precision"], strict=True) if p is not None]
    axes.scatter([r for r, _ in points], [p for _, p in points], s=10, alpha=0.6, color=_BLUE)
    if points:
        axes.plot(f["n2g_recall_mean"], f["n2g_precision_mean"], marker="*", markersize=13, color=_ORANGE)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.set_title(f"N2G, {len(points)} latents and their mean", fontsize=10)


def _draw_ablation(axes: Axes, f: Mapping[str, Any]) -> None:
    for name, label, color in (
        ("latent", "latent", _BLUE),
        ("channel", "coordinate", _ORANGE),
        ("component", "principal component", _GREEN),
    ):
        if f"ablation_{name}_counts" in f:
            shares = [count / f[f"ablation_{name}_n_effects"] for count in f[f"ablation_{name}_counts"]]
            axes.stairs(shares, f["ablation_log10_edges"], color=color, label=label, linewidth=1.4)
    axes.set_xlabel("log10 of (L1/L2)² / size")
    axes.set_ylabel("share of ablations")
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("sparsity of effects on logits", fontsize=10)
