"""The card of a training run: what `sae_runtime.evaluation.card` renders, of the figures that a run measures."""

from __future__ import annotations

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.manifest import Provenance
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.evaluation import card
from sae_runtime.evaluation.density import density_figures
from sae_runtime.evaluation.dictionary_evaluation import DictionaryEvaluation


def render_card(
    dictionary: Dictionary,
    evaluation: DictionaryEvaluation,
    statistics: LatentStatistics,
    provenance: Provenance,
    backbone: str,
) -> str:
    """Markdown with the description, the measured figures, latent densities and the settings."""
    fired = (statistics.firing_rate.double() * statistics.n_tokens).round().long().numpy()
    figures = {
        "dictionary": dictionary.name,
        "site": dictionary.site,
        "backbone": backbone,
        "activation": dictionary.activation,
        "normalization": dictionary.normalization,
        "d_in": dictionary.d_in,
        "n_latents": dictionary.n_latents,
        "k": dictionary.k,
        "feature_tokens": statistics.n_tokens,
        **evaluation.figures(),
        **density_figures(fired, statistics.n_tokens),
    }
    return card.render_card(figures, provenance=provenance)
