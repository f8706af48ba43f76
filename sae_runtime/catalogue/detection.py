"""How well a statement tells the tokens on which a latent fires from others (detection).

Silent tokens weigh as much as the active ones together: half of their weight is on hard ones (tokens on which latents
near this one fire), where there are such. So with P active tokens, and shares r of the random and h of the hard silent
tokens for which the statement is true,

    false alarms = P (r + h) / 2

and precision, recall and F1 are what they would be on a test of P active and P silent tokens. "Any token" has an F1 of
2/3, and a precision of 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.examples import Examples

Mask = npt.NDArray[np.bool_]
Weights = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """The figures of a test; 0 where nothing is predicted."""

    f1: float
    precision: float
    recall: float
    n_positive: int
    n_negative: int


def silent_weights(examples: Examples) -> Weights:
    """[n], 0 for active tokens; those of silent ones sum to 1: half of it on hard ones, if there are both."""
    weights = np.zeros(len(examples))
    random, hard = ~examples.active & ~examples.hard, examples.hard
    groups = [group for group in (random, hard) if group.any()]
    for group in groups:
        weights[group] = 1 / (len(groups) * group.sum())
    return weights


def detection(predicted: Mask, examples: Examples) -> Detection:
    """The figures of a prediction of which examples are active.

    Raises:
        ValueError: none of the examples is active, or all are.
    """
    active = examples.active
    n = int(active.sum())
    if n in (0, len(examples)):
        raise ValueError(f"{n} of {len(examples)} examples are active; a test needs both active and silent ones")
    recall = float(predicted[active].mean())
    false_alarms = float(silent_weights(examples) @ predicted)
    claimed = recall + false_alarms
    return Detection(
        f1=2 * recall / (1 + claimed),
        precision=recall / claimed if claimed else 0.0,
        recall=recall,
        n_positive=n,
        n_negative=len(examples) - n,
    )
