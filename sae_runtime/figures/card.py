"""CARD.md: what a dictionary is and how good it is, for people. One form for training runs and full evaluations.

Sections appear as far as there are figures for them: a training run measures fewer than `saeserve evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.manifest import Provenance
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.figures.density import density_figures

_BAR = 40  # characters of the longest bar
_SHOWN_EXPLANATIONS = 8
_SHOWN_NGRAMS = 3

_FAMILIES = {
    "topk": "TopK (k = {k})",
    "groupmax": "GroupMax (k = {k})",
    "relu": "ReLU",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
}
_INPUTS = {
    "centred": ", on activations without their mean",
    "layer_norm": ", on layer-normalised activations",
    "constant_norm": ", on activations scaled to one norm",
    "none": "",
}
_MAIN = (
    ("nmse", "NMSE", ".4f", "squared error over that of predicting the mean activation"),
    ("nmse_normalized", "NMSE, normalised", ".4f", "the same on activations as the dictionary normalises them"),
    ("relative_error", "Relative error", ".4f", "Σ(x̂ − x)² / Σx²"),
    ("variance_explained", "Variance explained", ".4f", "1 − variance of x̂ − x over variance of x"),
    ("l0", "L0", ".2f", "active latents per token"),
    ("dead_fraction", "Dead latents", ".2%", "active on none of the tokens"),
    ("dense_fraction", "Dense latents", ".2%", "active on more than 10 % of the tokens"),
    ("loss_recovered", "Loss recovered", ".4f", "(ablated − spliced) / (ablated − clean), ablation to zero"),
    ("delta_ce", "ΔCE", ".4f", "cross-entropy spliced − clean, nats per token"),
    ("kl", "KL divergence", ".4f", "clean from spliced, nats per token"),
    ("ce_clean", "Cross-entropy, clean", ".4f", "nats per token"),
    ("ce_spliced", "Cross-entropy, spliced", ".4f", "every token's activation replaced by its reconstruction"),
    ("ce_ablated", "Cross-entropy, ablated", ".4f", "every token's activation replaced by zeros"),
)


def describe_dictionary(dictionary: Dictionary, backbone: str) -> dict[str, Any]:
    """The figures that describe the measurement, not the quality."""
    return {
        "dictionary": dictionary.name,
        "site": dictionary.site,
        "backbone": backbone,
        "activation": dictionary.activation,
        "normalization": dictionary.normalization,
        "d_in": dictionary.d_in,
        "n_latents": dictionary.n_latents,
        "k": dictionary.k,
    }


def density_figures_of(statistics: LatentStatistics) -> dict[str, Any]:
    """The density figures of a card, as a DensityCounter gives them on the statistics' tokens."""
    fired = (statistics.firing_rate.double() * statistics.n_tokens).round().long().numpy()
    return {"feature_tokens": statistics.n_tokens, **density_figures(fired, statistics.n_tokens)}


def render_card(
    figures: Mapping[str, Any],
    *,
    provenance: Provenance | None = None,
    plots: Sequence[str] = (),
    explanations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Markdown with the description, figures, plots and training settings.

    Args:
        figures: as in evaluation.json; description (`dictionary`, `site`, ...) and main figures must be there.
        plots: paths of pictures, relative to the card.
        explanations: as in explanations.json; the first few are shown, which are a random choice.
    """
    sections = [
        _title(figures),
        _main(figures),
        *(f"![{path.rsplit('/')[-1].split('.')[0]}]({path})" for path in plots),
        _baselines(figures),
        _kinds(figures),
        _single_tokens(figures),
        _probes(figures),
        _n2g(figures, explanations),
        _geometry(figures),
        _densities(figures),
        _training(provenance),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(f: Mapping[str, Any]) -> str:
    family = _FAMILIES.get(f["activation"], f["activation"]).format(k=f["k"])
    return (
        f"# {f['dictionary']}\n\n{family} dictionary of {f['n_latents']:,} latents for site `{f['site']}` "
        f"({f['d_in']} wide) of backbone `{f['backbone']}`{_INPUTS.get(f['normalization'], '')}."
    )


def _main(f: Mapping[str, Any]) -> str:
    rows = []
    for name, label, form, meaning in _MAIN:
        if f.get(name) is None:
            continue
        low, high = f.get(f"{name}_low"), f.get(f"{name}_high")
        interval = f" ({low:{form}} to {high:{form}})" if low is not None and high is not None else ""
        rows.append((label, f"{f[name]:{form}}{interval}", meaning))
    note = " In brackets: 95 % bootstrap intervals over documents." if "nmse_low" in f else ""
    return (
        "## Measured on held-out text\n\n"
        + _table(("figure", "value", "meaning"), rows, right={1})
        + f"\n\nOver {int(f['n_tokens']):,} tokens, in float32, with the weights as stored.{note}"
    )


def _baselines(f: Mapping[str, Any]) -> str:
    if "baseline_n_tokens" not in f:
        return ""
    names = {
        "dictionary": "this dictionary",
        "pca": f"{f['baseline_pca_components']} principal components",
        "random": "random dictionary, as many latents, same L0",
        "mean": "mean activation",
    }
    rows = [
        (label, *(_number(f[f"baseline_{name}_{key}"]) for key in ("nmse", "loss_recovered", "delta_ce", "kl")))
        for name, label in names.items()
    ]
    return (
        f"## Baselines\n\n{_table(('', 'NMSE', 'loss recovered', 'ΔCE', 'KL'), rows, right={1, 2, 3, 4})}\n\n"
        f"Over {f['baseline_n_tokens']:,} tokens, on which the baselines were also fitted. Where the dictionary "
        "normalises its input, principal components and random dictionary get the same normalisation. The NMSE of this "
        f"dictionary takes {f['baseline_pca_components_to_match']} of {f['d_in']} principal components."
    )


def _kinds(f: Mapping[str, Any]) -> str:
    if not f.get("kinds"):
        return ""
    keys = ("n_tokens", "nmse", "l0", "ce_clean", "delta_ce", "loss_recovered", "kl")
    rows = [(kind, *(_number(f[f"kind_{kind}_{key}"]) for key in keys)) for kind in f["kinds"]]
    header = ("text", "tokens", "NMSE", "L0", "CE, clean", "ΔCE", "loss recovered", "KL")
    return f"## By kind of text\n\n{_table(header, rows, right=set(range(1, 8)))}"


def _single_tokens(f: Mapping[str, Any]) -> str:
    paragraphs = []
    if "single_splice_positions" in f:
        paragraphs.append(
            f"Replacing one token's activation alone ({f['single_splice_positions']} tokens): ΔCE of the next token "
            f"{_interval(f, 'single_splice_delta_ce')}, KL at the token {_interval(f, 'single_splice_kl')}, at the "
            f"{f['ablation_horizon'] - 1} later ones {_interval(f, 'single_splice_later_kl')} nats."
        )
    if "ablation_latent_sparsity_mean" in f:
        others = " ".join(
            f"{label}: {_interval(f, f'ablation_{name}_sparsity_mean')}."
            for name, label in (("channel", "One coordinate"), ("component", "One principal component"))
            if f"ablation_{name}_sparsity_mean" in f
        )
        paragraphs.append(
            f"Ablating one active latent at one token ({f['ablation_latent_n_effects']} latents at "
            f"{f['ablation_positions']} tokens) changes the next {f['ablation_horizon']} tokens' logits with sparsity "
            f"(L1/L2)² / size of {_interval(f, 'ablation_latent_sparsity_mean')}; 1 is spread evenly. {others}"
        )
    return "## Single tokens and latents\n\n" + "\n\n".join(paragraphs).rstrip() if paragraphs else ""


def _probes(f: Mapping[str, Any]) -> str:
    if not f.get("probe_tasks"):
        return ""
    keys = ("loss", "accuracy", "neuron_loss", "random_latent_loss")
    rows = [
        (task, str(f[f"probe_{task}_latent"]), *(_number(f[f"probe_{task}_{key}"]) for key in keys))
        for task in f["probe_tasks"]
    ]
    means = (f["probe_loss_mean"], None, f["probe_neuron_loss_mean"], f["probe_random_latent_loss_mean"])
    rows.append(("mean", "", *("" if mean is None else _number(mean) for mean in means)))
    header = ("task", "best latent", "loss", "accuracy", "best coordinate", "best random latent")
    return (
        f"## Probes\n\n{_table(header, rows, right=set(range(1, 6)))}\n\n"
        "Logistic regression on one latent, chosen on one half of the documents, scored on the other; cross-entropy in "
        "nats, chance is 0.6931. Names that begin with `token_` ask about one token, the others about "
        f"{f['setting_probe_chunk']} tokens of one document."
    )


def _n2g(f: Mapping[str, Any], explanations: Sequence[Mapping[str, Any]]) -> str:
    if not f.get("n2g_latents"):
        return ""
    rows = [
        (label, *(_interval(f, f"n2g_{prefix}{key}_mean") for key in ("precision", "recall", "f1")))
        for prefix, label in (("", "n-grams"), ("unigram_", "last token alone"))
    ]
    shown = [
        (
            str(e["latent"]),
            "; ".join(_ngram(ngram) for ngram in e["ngrams"][:_SHOWN_NGRAMS])
            + (" …" if e["ngrams"][_SHOWN_NGRAMS:] else ""),
            _number(e["precision"]),
            _number(e["recall"]),
        )
        for e in explanations[:_SHOWN_EXPLANATIONS]
    ]
    return (
        f"## N2G explanations\n\n{_table(('explanation', 'precision', 'recall', 'F1'), rows, right={1, 2, 3})}\n\n"
        f"Means over {len(f['n2g_latents'])} latents, drawn from the {f['n2g_eligible_fraction']:.0%} that fire often "
        "enough; whether a latent fires on a token at all is predicted, on text the n-grams were not built from. "
        f"{f['n2g_unexplained_fraction']:.0%} of the activations have no n-gram of up to {f['setting_n2g_max_length']} "
        "tokens that keeps half of them. The first of the drawn latents (∗ is any token):\n\n"
        + _table(("latent", "n-grams", "precision", "recall"), shown, right={2, 3})
    )


def _geometry(f: Mapping[str, Any]) -> str:
    if not f.get("geometry_latents"):
        return ""
    return (
        "## Decoder geometry\n\nCosine of a latent's nearest neighbour: mean "
        f"{f['geometry_nearest_cosine_mean']:.3f}, 5 % below {f['geometry_nearest_cosine_p05']:.3f}, 5 % above "
        f"{f['geometry_nearest_cosine_p95']:.3f}; {f['geometry_close_fraction']:.2%} of the latents have a neighbour "
        f"above 0.9. As many random directions: mean {f['geometry_random_nearest_cosine_mean']:.3f}."
    )


def _densities(f: Mapping[str, Any]) -> str:
    """One line for each bin of density from the lowest that is not empty to the highest."""
    if "density_counts" not in f:
        return ""
    edges, counts = f["density_log10_edges"], f["density_counts"]
    filled = [i for i, count in enumerate(counts) if count]
    lines = [("never", f["density_never"])]
    if filled:
        lines += [
            (f"{10 ** edges[i]:.1e} to {10 ** edges[i + 1]:.1e}", counts[i]) for i in range(filled[0], filled[-1] + 1)
        ]
    longest = max(count for _, count in lines)
    bars = "\n".join(f"{label:>18}  {count:6}  {'#' * round(_BAR * count / longest)}" for label, count in lines)
    return (
        f"## Densities\n\nShare of {f['feature_tokens']:,} held-out tokens on which a latent is active, and the number "
        f"of latents.\n\n```\n{bars}\n```"
    )


def _training(provenance: Provenance | None) -> str:
    if provenance is None or not provenance.config:
        return ""
    tokens = f"{provenance.tokens:,} tokens" if provenance.tokens is not None else "An unknown number of tokens"
    rows = [(name, _setting(value)) for name, value in provenance.config.items()]
    return (
        f"## Training\n\n{tokens} of {provenance.data}, seed {provenance.seed}.\n"
        f"Made by {provenance.code_version}, {provenance.created}.\n\n{_table(('setting', 'value'), rows)}"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: set[int] | None = None) -> str:
    rule = ["---:" if i in (right or set()) else "---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _interval(f: Mapping[str, Any], name: str) -> str:
    if f.get(name) is None:
        return "-"
    return f"{f[name]:.4f} ({f[f'{name}_low']:.4f} to {f[f'{name}_high']:.4f})"


def _ngram(ngram: Sequence[str | None]) -> str:
    text = "".join("∗" if token is None else token for token in ngram)
    # Inside a table and a code span: no line ends, bars or backticks.
    return "`" + text.replace("\n", "↵").replace("|", "¦").replace("`", "´") + "`"


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
