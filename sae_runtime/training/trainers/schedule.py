"""What changes with the step: the learning rate, and the weight of a sparsity penalty."""

from __future__ import annotations

import math

from sae_runtime.training.config import TrainingConfig


def learning_rate_share(config: TrainingConfig, step: int) -> float:
    """Share of the learning rate at this step (counted from 0): a linear rise, a plateau, a linear fall to 0."""
    rise = (step + 1) / max(config.warmup_steps, 1)
    fall = (config.n_steps - step) / max(config.decay_fraction * config.n_steps, 1)
    return max(0.0, min(1.0, rise, fall if config.decay_fraction else 1.0))


class SparsityWeight:
    """The weight λ of a sparsity penalty: given and warmed up, or steered so that L0 becomes the configured k.

    Given: λ rises linearly from 0 over sparsity_warmup_fraction of the steps (Bricken et al. 2023 and later recipes).
    Steered: a proportional-integral controller of log λ on log(L0 / k) of each step. λ then stands for "as much as k
    active latents need", and runs of different families compare at equal L0.
    """

    _INTEGRAL = 0.03  # by which log λ moves in a step where L0 is e times k or more
    _PROPORTIONAL = 1.0  # answers at once: log λ lags behind L0, and would swing around its aim

    def __init__(self, config: TrainingConfig, initial: float) -> None:
        self._given = config.sparsity_coefficient
        self._target = float(config.k)
        self._warmup_steps = config.sparsity_warmup_fraction * config.n_steps
        self._log_weight = math.log(initial)
        self._pull = 0.0  # log(L0 / k) of the last step, at most 1 either way

    def at(self, step: int) -> float:
        """λ at this step (counted from 0)."""
        if self._given is None:
            return math.exp(self._log_weight + self._PROPORTIONAL * self._pull)
        return self._given * min(1.0, (step + 1) / max(self._warmup_steps, 1.0))

    def observe(self, l0: float) -> None:
        """Takes notice of the mean number of active latents of the step's batch."""
        if self._given is None:
            self._pull = max(-1.0, min(1.0, math.log(max(l0, 0.1) / self._target)))
            self._log_weight += self._INTEGRAL * self._pull

    def state_dict(self) -> dict[str, float]:
        return {"log_weight": self._log_weight, "pull": self._pull}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._log_weight, self._pull = state["log_weight"], state["pull"]
