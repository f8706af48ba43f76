"""Results of measurements of features: plain data without torch, shared by the library, the service and its clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae_runtime.edits.edit import Edit

Ablation = Literal["zero", "mean"]
"""What an ablated feature becomes: zero, or its recorded mean."""
RankBy = Literal["kl", "loss", "accuracy", "logit"]
"""The figure of EffectFigures by which the effects of a study are sorted."""


class FeatureId(NamedTuple):
    """A feature: a dictionary's name, and a latent of that dictionary."""

    dictionary: str
    feature: int


# Scores


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The model's predictions on a text of n tokens; entry i is the prediction made after token i."""

    loss: NDArray[np.float32]
    """[n - 1] nats: -log p(token i + 1)."""
    correct: NDArray[np.bool_]
    """[n - 1] whether token i + 1 is the likeliest."""
    target_logits: NDArray[np.float32]
    """[n - 1] logit of token i + 1."""
    token_logits: NDArray[np.float32]
    """[n, m] logits of the chosen tokens."""
    mean_loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class TextScore:
    """The scores of one text of n tokens."""

    unedited: TokenScores
    edited: TokenScores | None
    """None without edits."""
    kl: NDArray[np.float32] | None
    """[n] KL(unedited || edited) in nats, with edits."""

    @property
    def delta_loss(self) -> NDArray[np.float32] | None:
        """[n - 1] edited - unedited, nats; above 0 if the edits made the token less likely."""
        return None if self.edited is None else self.edited.loss - self.unedited.loss


# Ablations


@dataclass(frozen=True)
class EffectFigures:
    """Means over predictions; changes are ablated - unedited."""

    n_tokens: int
    """Tokens after which predictions were compared (for KL and logits)."""
    n_targets: int
    """The tokens among them that another follows (for loss and accuracy)."""
    delta_loss: float
    """Nats; above 0 if the text became less likely."""
    delta_accuracy: float
    kl: float
    """KL(unedited || ablated) in nats."""
    delta_target_logit: float
    """Change of the following token's logit."""
    delta_logits: tuple[float, ...]
    """One for each chosen token."""


@dataclass(frozen=True)
class DistanceEffect:
    """Effect of changing one token on the predictions made `first` to `last` tokens after it."""

    first: int
    last: int
    figures: EffectFigures


@dataclass(frozen=True)
class FeatureEffect:
    """The effect of ablating one feature on the texts of a study."""

    feature: FeatureId
    ablation: Ablation
    active_tokens: int
    active_texts: int
    mean_activation: float
    """Over the tokens on which the feature is active; 0 if there are none."""
    everywhere: EffectFigures
    """The feature is ablated on all tokens; means over all predictions of all texts."""
    at_active: EffectFigures
    """The same, with means over the predictions made on tokens where the feature is active."""
    delta_loss_interval: tuple[float, float]
    """95 % bootstrap interval of everywhere.delta_loss over texts."""
    text_delta_loss: tuple[float, ...]
    """Mean change of the loss of each text."""
    text_kl: tuple[float, ...]
    """Mean KL of each text."""
    by_distance: tuple[DistanceEffect, ...]
    """The feature is ablated on one token of a text at a time; empty unless the study did so."""


@dataclass(frozen=True)
class AblationReport:
    """A whole study."""

    effects: tuple[FeatureEffect, ...]
    """The largest first, by the chosen ranking."""
    n_texts: int
    n_targets: int
    """Predictions with a target, over all texts."""
    loss: float
    """Unedited, nats a token."""
    accuracy: float
    """Unedited."""


# Attributions


@dataclass(frozen=True)
class Attribution:
    """One feature on one token: the estimate of its effect on a metric m."""

    feature: FeatureId
    position: int
    activation: float
    """z."""
    gradient: float
    """dm/dz."""
    attribution: float
    """z dm/dz: to first order, the fall of the metric without the feature."""


@dataclass(frozen=True)
class FeatureAttribution(Attribution):
    """One feature on one token: the estimate and the measured effect."""

    effect: float
    """m(unedited) - m(ablated to zero on this token): the actual fall of the metric."""


@dataclass(frozen=True, eq=False)
class AttributionReport:
    """Attributions of one text."""

    metric: float
    """m of the unedited text: the target's logit, minus the foil's if there is one."""
    attributions: tuple[FeatureAttribution, ...]
    """The largest in size first."""
    n_active: int
    """Number of active (feature, token) pairs."""
    totals: Mapping[str, float]
    """Sum of all attributions, by dictionary."""
    pearson: float | None
    """Of attribution and effect over `attributions`; None for fewer than two."""
    spearman: float | None


# Contrasts


@dataclass(frozen=True)
class FeatureContrast:
    """One feature in two sets of texts, a and b."""

    feature: FeatureId
    mean_a: float
    """Mean over the texts of a of their aggregated activation."""
    mean_b: float
    active_a: int
    """Texts of a in which the feature is active."""
    active_b: int
    effect_size: float
    """Above 0: stronger in a. 0 where the pooled standard deviation is 0."""
    auc: float
    """0.5: no difference; 1: every text of a is above every text of b."""
    p_value: float
    q_value: float


@dataclass(frozen=True)
class SetScore:
    """The change that edits make to the predictions on a set of texts."""

    delta_loss: float
    """Nats a token, mean over all predictions of the set."""
    interval: tuple[float, float]
    """95 % bootstrap interval over texts."""
    kl: float
    """Mean KL(unedited || edited) in nats."""


@dataclass(frozen=True)
class SuggestionTrial:
    """One strength of a suggested edit, scored on the sets that it was made from."""

    edits: tuple[Edit, ...]
    a: SetScore
    b: SetScore
    shift: float
    """b.delta_loss - a.delta_loss: how much the edits favour the texts of a, nats a token."""
