"""What every key of evaluation.json means. A part in <brackets> stands for a name that depends on the text."""

from __future__ import annotations

import re

_INTERVAL = "; _low and _high: ends of its 95 % bootstrap interval"

DESCRIPTIONS: dict[str, str] = {
    # Description
    "dictionary, site, backbone": "names of what was measured and where",
    "activation, normalization, d_in, n_latents, k": "form; k is null unless the dictionary keeps k latents a token",
    "setting_<name>": "a setting of the evaluation, see EvaluationSettings",
    # Reconstruction and splicing, over n_tokens
    "n_tokens": "tokens of the figures of reconstruction, cross-entropy and divergence",
    "nmse": "Σ|x̂ − x|² / Σ|x − mean|², the mean over these tokens (Gao et al. 2024)" + _INTERVAL,
    "nmse_low, nmse_high": "interval; whole documents are resampled, rows where there are fewer than 20",
    "relative_error": "Σ|x̂ − x|² / Σ|x|² (README of openai/sparse_autoencoder)",
    "nmse_normalized": "nmse on activations as the dictionary normalises them, where every token counts the same",
    "variance_explained": "1 − Σ Var(x̂ − x) / Σ Var(x) over coordinates: unlike 1 − nmse it forgives a constant offset",
    "l0": "active latents per token",
    "dead_fraction, dense_fraction": "latents active on none, on more than a tenth of the tokens",
    "ce_clean, ce_spliced, ce_ablated": "nats per token of the model; with every token's activation replaced by its "
    "reconstruction; by zeros",
    "delta_ce, delta_ce_low, delta_ce_high": "ce_spliced − ce_clean, with its interval",
    "loss_recovered, loss_recovered_low, loss_recovered_high": "(ce_ablated − ce_spliced) / (ce_ablated − ce_clean)",
    "kl, kl_low, kl_high": "KL(clean ‖ spliced) of the next-token distributions, nats per token",
    "position_start, position_end": "lists: ranges of positions in the row (end excluded) of the other position_ lists",
    "position_nmse, position_ce_clean, position_ce_spliced, position_ce_ablated": "lists: the same figures by position",
    "position_delta_ce, position_loss_recovered, position_kl": "lists: the same figures by position",
    "kinds": "list: kinds of text with tokens in the sample",
    "kind_<kind>_n_tokens, kind_<kind>_l0, kind_<kind>_nmse": "of one kind; nmse is against the mean over all kinds",
    "kind_<kind>_ce_clean, kind_<kind>_ce_spliced, kind_<kind>_ce_ablated": "of one kind",
    "kind_<kind>_delta_ce, kind_<kind>_loss_recovered, kind_<kind>_kl": "of one kind",
    "single_splice_positions": "tokens whose activation alone was replaced",
    "single_splice_delta_ce, single_splice_delta_ce_low, single_splice_delta_ce_high": "effect on the next loss, nats",
    "single_splice_kl, single_splice_kl_low, single_splice_kl_high": "KL(clean ‖ spliced) at that token",
    "single_splice_later_kl, single_splice_later_kl_low, single_splice_later_kl_high": "mean of it over later tokens",
    # Baselines
    "baseline_n_tokens": "tokens that baselines are fitted and measured on, the first of n_tokens",
    "baseline_<name>_nmse, baseline_<name>_ce_spliced, baseline_<name>_ce_ablated": "of dictionary, pca, random, mean",
    "baseline_<name>_delta_ce, baseline_<name>_loss_recovered, baseline_<name>_kl": "of dictionary, pca, random, mean",
    "baseline_pca_components": "principal components kept: the dictionary's L0, rounded",
    "baseline_pca_components_to_match": "principal components that reach the dictionary's nmse_normalized",
    # Sparsity, over feature_tokens
    "feature_tokens": "tokens of L0, densities, probes and explanations",
    "feature_l0_mean, feature_l0_std, feature_l0_p05, feature_l0_p50, feature_l0_p95": "active latents per token",
    "l0_histogram_edges, l0_histogram_counts": "lists: tokens by their number of active latents",
    "feature_dead_fraction, feature_dense_fraction": "as dead_fraction and dense_fraction, over feature_tokens",
    "density_never": "latents that never fire",
    "density_log10_edges, density_counts": "lists: the other latents by log10 of the share of tokens they fire on",
    # Probes
    "probe_tasks": "list: names of the tasks; token_ asks about a token, others about some tokens of a document",
    "probe_loss_mean, probe_neuron_loss_mean, probe_random_latent_loss_mean": "mean held-out losses of the best "
    "latent, the best coordinate of the activation, the best latent of a random dictionary; chance is ln 2",
    "probe_<task>_latent": "the latent whose probe fits best",
    "probe_<task>_loss, probe_<task>_accuracy, probe_<task>_n_examples": "of that probe on the other half of the text; "
    "nats, classes are balanced",
    "probe_<task>_fit_loss": "of that probe on the half it was fitted and chosen on",
    "probe_<task>_neuron_loss, probe_<task>_random_latent_loss": "the same held-out loss for the other two",
    # N2G
    "n2g_latents, n2g_precision, n2g_recall": "lists: the explained latents, drawn from those that fire often "
    "enough; share of predicted tokens that are active (null: none predicted), share of active ones that are predicted",
    "n2g_precision_mean, n2g_precision_mean_low, n2g_precision_mean_high": "over latents that predict anything",
    "n2g_recall_mean, n2g_recall_mean_low, n2g_recall_mean_high": "over all explained latents",
    "n2g_f1_mean, n2g_f1_mean_low, n2g_f1_mean_high": "2 · both / (predicted + active), over all explained latents",
    "n2g_unigram_<figure>_mean, n2g_unigram_<figure>_mean_low, n2g_unigram_<figure>_mean_high": "the same for the "
    "examples' last tokens without context",
    "n2g_eligible_fraction": "share of the candidate latents that fire often enough in both halves of the text",
    "n2g_silent_explanations": "explained latents whose n-grams predict no token",
    "n2g_unexplained_fraction": "share of activations without an n-gram that keeps half of them",
    "n2g_patterns_mean, n2g_pattern_length_mean": "n-grams per latent, tokens per n-gram",
    # Ablation
    "ablation_positions, ablation_window, ablation_horizon": "tokens at which something is ablated, length of rows, "
    "tokens whose logits count",
    "ablation_<what>_n_effects": "ablations of a latent, a channel (one coordinate) or a component (a principal one)",
    "ablation_<what>_sparsity_mean, ablation_<what>_sparsity_median": "(L1/L2)² / size of the changes of logits",
    "ablation_<what>_sparsity_mean_low, ablation_<what>_sparsity_mean_high": "interval; positions are resampled",
    "ablation_log10_edges, ablation_<what>_counts": "lists: ablations by log10 of their sparsity",
    # Geometry
    "geometry_latents": "latents whose nearest neighbour was searched among all",
    "geometry_nearest_cosine_mean, geometry_nearest_cosine_p50": "mean and median of its cosine, of decoder rows",
    "geometry_nearest_cosine_p05, geometry_nearest_cosine_p95": "quantiles of the same",
    "geometry_close_fraction": "share of them with a neighbour above 0.9",
    "geometry_random_nearest_cosine_mean": "the same mean for as many random directions",
    "geometry_histogram_edges, geometry_histogram_counts, geometry_random_histogram_counts": "lists",
}
"""By the names that share a meaning, in the order of the file."""

_PATTERNS = [
    (re.compile(re.sub(r"<\w+>", r"\\w+", name)), meaning)
    for names, meaning in DESCRIPTIONS.items()
    for name in names.split(", ")
]


def describe(name: str) -> str:
    """What a figure means.

    Raises:
        KeyError: there is no such figure.
    """
    exact = [meaning for pattern, meaning in _PATTERNS if pattern.pattern == name]
    meanings = exact or [meaning for pattern, meaning in _PATTERNS if pattern.fullmatch(name)]
    if not meanings:
        raise KeyError(name)
    return meanings[0]
