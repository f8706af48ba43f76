"""The scaling law of reconstruction error in the number of latents n and of active latents k, fitted to a sweep.

    L(n, k) = exp(alpha + beta_k log k + beta_n log n + gamma log k log n) + exp(zeta + eta log k)

Gao et al. 2024, section 3.2: the first term falls with n, the second is what no number of latents removes. With fewer
than eight runs, or fewer than four values of n, the second term cannot be told from the first and is left out. The fit
minimises squared differences of log L; intervals come from refits of resampled residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PARAMETERS = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")
_REDUCIBLE = 4  # parameters of the first term
_MIN_RUNS = 8
_MIN_LATENT_COUNTS = 4
_STARTS = (0.05, 0.3, 0.7)  # shares of the smallest loss that the irreducible term begins with
_RIDGE = 1e-9
_STEPS = 200

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep."""

    n_latents: int
    k: int
    loss: float
    """Held-out NMSE: squared error over that of predicting the mean."""


@dataclass(frozen=True)
class ScalingFit:
    """A fitted law."""

    parameters: dict[str, float]
    """By the names of `PARAMETERS`, without zeta and eta where the irreducible term is left out."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap interval of each."""
    residual_std: float
    """Standard deviation of log loss around the law, with the degrees of freedom that are left."""
    r_squared: float
    """Of log loss."""

    def loss(self, n_latents: int, k: int) -> float:
        """The loss that the law predicts for a dictionary."""
        theta = np.array(list(self.parameters.values()))
        return float(np.exp(_log_law(theta, *_logs([SweepPoint(n_latents, k, 1.0)]))[0]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fit_scaling_law(points: Sequence[SweepPoint], *, resamples: int = 200, seed: int = 0) -> ScalingFit:
    """Fits the law to at least five points with two values each of n and k.

    Raises:
        ValueError: too few points, too few different n or k, or a loss that is not positive and finite.
    """
    n_values, k_values = {p.n_latents for p in points}, {p.k for p in points}
    if len(points) <= _REDUCIBLE or len(n_values) < 2 or len(k_values) < 2:
        raise ValueError(
            f"{len(points)} runs with {len(n_values)} values of n_latents and {len(k_values)} of k, "
            f"expected at least {_REDUCIBLE + 1} runs and 2 values of each"
        )
    log_n, log_k = _logs(points)
    loss = np.array([p.loss for p in points])
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise ValueError(f"losses must be positive and finite, found {loss.tolist()}")
    observed = np.log(loss)
    full = len(points) >= _MIN_RUNS and len(n_values) >= _MIN_LATENT_COUNTS
    theta = _fit(log_n, log_k, observed, _starts(log_n, log_k, observed, full))
    fitted = _log_law(theta, log_n, log_k)
    freedom = max(1, len(points) - len(theta))
    residuals = observed - fitted
    # Residuals of a fit are smaller than the noise; scaled to what the freedom left says.
    scaled = residuals * (len(points) / freedom) ** 0.5
    generator = np.random.default_rng(seed)
    resampled = [_fit(log_n, log_k, fitted + generator.choice(scaled, len(points)), [theta]) for _ in range(resamples)]
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    names = PARAMETERS[: len(theta)]
    spread = np.square(observed - observed.mean()).sum()
    return ScalingFit(
        parameters=dict(zip(names, theta.tolist(), strict=True)),
        intervals=dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True)),
        residual_std=float(np.sqrt(np.square(residuals).sum() / freedom)),
        r_squared=float(1 - np.square(residuals).sum() / spread) if spread else 1.0,
    )


def _logs(points: Sequence[SweepPoint]) -> tuple[Array, Array]:
    return np.log([float(p.n_latents) for p in points]), np.log([float(p.k) for p in points])


def _design(log_n: Array, log_k: Array) -> Array:
    """The columns 1, log k, log n, log k · log n, which alpha, beta_k, beta_n and gamma multiply: [points, 4]."""
    return np.stack([np.ones_like(log_n), log_k, log_n, log_k * log_n], axis=1)


def _log_law(theta: Array, log_n: Array, log_k: Array) -> Array:
    reducible: Array = _design(log_n, log_k) @ theta[:_REDUCIBLE]
    if len(theta) == _REDUCIBLE:
        return reducible
    return np.asarray(np.logaddexp(reducible, theta[4] + theta[5] * log_k))


def _jacobian(theta: Array, log_n: Array, log_k: Array) -> Array:
    """Derivatives of `_log_law`, [points, parameters]."""
    design = _design(log_n, log_k)
    if len(theta) == _REDUCIBLE:
        return design
    irreducible = np.exp(theta[4] + theta[5] * log_k - _log_law(theta, log_n, log_k))[:, None]  # its share of the loss
    return np.concatenate([(1 - irreducible) * design, irreducible * design[:, :2]], axis=1)


def _starts(log_n: Array, log_k: Array, observed: Array, full: bool) -> list[Array]:
    """Least-squares fits of the first term, to the loss less some share of its smallest value."""
    design = _design(log_n, log_k)
    if not full:
        return [_least_squares(design, observed)]
    loss, floor = np.exp(observed), np.exp(observed).min()
    return [
        np.append(_least_squares(design, np.log(loss - share * floor)), [np.log(share * floor), 0.0])
        for share in _STARTS
    ]


def _least_squares(design: Array, target: Array) -> Array:
    return np.asarray(np.linalg.lstsq(design, target)[0], dtype=np.float64)


def _fit(log_n: Array, log_k: Array, observed: Array, starts: Sequence[Array]) -> Array:
    """Levenberg's and Marquardt's method from each start; the best end."""
    best: tuple[float, Array] | None = None
    for start in starts:
        theta, damping = start, 1e-3
        residuals = _log_law(theta, log_n, log_k) - observed
        error = float(residuals @ residuals)
        for _ in range(_STEPS):
            jacobian = _jacobian(theta, log_n, log_k)
            curvature = jacobian.T @ jacobian
            damped = curvature + damping * np.diag(curvature.diagonal() + _RIDGE)
            moved = theta - np.linalg.solve(damped, jacobian.T @ residuals)
            residuals_moved = _log_law(moved, log_n, log_k) - observed
            error_moved = float(residuals_moved @ residuals_moved)
            if error_moved < error:
                done = error - error_moved < 1e-12 * error
                theta, residuals, error, damping = moved, residuals_moved, error_moved, damping / 3
            else:
                damping *= 4
                done = damping > 1e12
            if done:
                break
        if best is None or error < best[0]:
            best = error, theta
    assert best is not None
    return best[1]
