"""Logistic regression on one latent at a time, for all latents together, on sparse examples.

The probe of Gao et al. 2024, section 4.2: min over latents i, weight w and bias b of the cross-entropy of
sigmoid(w z_i + b), here on activations (after TopK, ReLU, ...) instead of pre-activations, which no dense matrix of
examples × latents could hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

RIDGE = 1e-4
"""Penalty RIDGE / 2 · (w · largest value)² per example: keeps separable tasks finite and hardly changes others."""
_ITERATIONS = 60
_TOLERANCE = 1e-7  # of the gradient, per example
_HALVINGS = 30


@dataclass(frozen=True, eq=False)
class SparseExamples:
    """Non-zero values of n_examples × n_columns (latents, or coordinates), in no particular order."""

    example: Integers
    column: Integers
    value: Floats
    n_examples: int
    n_columns: int

    def __getitem__(self, examples: Integers) -> SparseExamples:
        """The given examples, numbered in the given order."""
        number = np.full(self.n_examples, -1, np.int64)
        number[examples] = np.arange(len(examples))
        new = number[self.example]
        kept = new >= 0
        return SparseExamples(new[kept], self.column[kept], self.value[kept], len(examples), self.n_columns)

    def of_column(self, column: int) -> Floats:
        """[n_examples], the values of one column."""
        dense = np.zeros(self.n_examples)
        mine = self.column == column
        dense[self.example[mine]] = self.value[mine]
        return dense


@dataclass(frozen=True, eq=False)
class Probes:
    """One probe for each column."""

    weight: Floats
    bias: Floats
    loss: Floats
    """Mean cross-entropy on the examples it was fitted on, nats, without the penalty."""


def fit_probes(examples: SparseExamples, labels: npt.NDArray[np.bool_]) -> Probes:
    """Newton's method on every column at once; a step that does not lower a column's loss is halved.

    labels: [n_examples], both classes present.

    Raises:
        ValueError: only one class.
    """
    n, n_positive = len(labels), int(labels.sum())
    if not 0 < n_positive < n:
        raise ValueError(f"a probe needs examples of both classes, found {n_positive} positive of {n}")
    order = np.argsort(examples.column, kind="stable")
    column = examples.column[order]
    value, label = examples.value[order], labels[examples.example[order]].astype(np.float64)
    present, group = np.unique(column, return_inverse=True)  # columns with a value
    largest = np.maximum.reduceat(np.abs(value), np.searchsorted(column, present)) if len(present) else np.zeros(0)
    largest[largest == 0] = 1
    value = value / largest[group]

    start = float(np.log(n_positive / (n - n_positive)))
    weight, bias = np.zeros(len(present)), np.full(len(present), start)
    active = np.arange(len(present))
    for _ in range(_ITERATIONS):
        problem = _Problem(value, label, group, len(active), n, n_positive)
        w, b = weight[active], bias[active]
        gradient_w, gradient_b, step_w, step_b = problem.newton_step(w, b)
        open_ = np.maximum(np.abs(gradient_w), np.abs(gradient_b)) > _TOLERANCE * n
        before = problem.objective(w, b)
        size = open_.astype(np.float64)
        for _ in range(_HALVINGS):
            worse = problem.objective(w - size * step_w, b - size * step_b) > before
            if not worse.any():
                break
            size[worse] /= 2
        else:
            size[worse] = 0
        weight[active], bias[active] = w - size * step_w, b - size * step_b
        moving = size > 0
        if not moving.any():
            break
        # Converged columns are dropped, so that the last slow ones are cheap.
        kept = moving[group]
        number = np.cumsum(moving) - 1
        value, label, group = value[kept], label[kept], number[group[kept]]
        active = active[moving]

    result = Probes(np.zeros(examples.n_columns), np.full(examples.n_columns, start), np.empty(examples.n_columns))
    share = n_positive / n
    result.loss[:] = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    result.weight[present], result.bias[present] = weight / largest, bias
    if len(present):
        # The loss without the penalty, from the values in their own units.
        everything = _Problem(
            examples.value[order],
            labels[examples.example[order]].astype(np.float64),
            np.unique(column, return_inverse=True)[1],
            len(present),
            n,
            n_positive,
        )
        result.loss[present] = everything.loss(weight / largest, bias) / n
    return result


def probe_loss(values: Floats, labels: npt.NDArray[np.bool_], weight: float, bias: float) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy of one probe on examples' values [n]."""
    logit = weight * values + bias
    return float(np.mean(_softplus(logit) - labels * logit)), float(np.mean((logit > 0) == labels))


class _Problem:
    """Sums over examples for each column; the examples where a column is zero are counted, not listed."""

    def __init__(self, value: Floats, label: Floats, group: Integers, n_columns: int, n: int, n_positive: int) -> None:
        self._value, self._label, self._group, self._n_columns, self._n = value, label, group, n_columns, n
        self._zeros = n - self._sum(np.ones_like(value))  # (columns,)
        self._zero_positives = n_positive - self._sum(label)

    def newton_step(self, w: Floats, b: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Gradients for w and b, and the steps to subtract from w and b."""
        p = _sigmoid(w[self._group] * self._value + b[self._group])
        p_zero = _sigmoid(b)
        miss, slope = p - self._label, p * (1 - p)
        gradient_w = self._sum(miss * self._value) + RIDGE * self._n * w
        gradient_b = self._sum(miss) + self._zeros * p_zero - self._zero_positives
        ww = self._sum(slope * self._value**2) + RIDGE * self._n
        wb = self._sum(slope * self._value)
        bb = self._sum(slope) + self._zeros * p_zero * (1 - p_zero) + 1e-12
        determinant = np.maximum(ww * bb - wb**2, 1e-300)
        return (
            gradient_w,
            gradient_b,
            (bb * gradient_w - wb * gradient_b) / determinant,
            (ww * gradient_b - wb * gradient_w) / determinant,
        )

    def loss(self, w: Floats, b: Floats) -> Floats:
        """Summed cross-entropy."""
        logit = w[self._group] * self._value + b[self._group]
        listed = self._sum(_softplus(logit) - self._label * logit)
        return listed + self._zeros * _softplus(b) - self._zero_positives * b

    def objective(self, w: Floats, b: Floats) -> Floats:
        """The same with the penalty; w is per largest value here."""
        return self.loss(w, b) + RIDGE * self._n / 2 * w**2

    def _sum(self, values: Floats) -> Floats:
        return np.bincount(self._group, values, minlength=self._n_columns).astype(np.float64)


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))  # does not overflow


def _softplus(x: Floats) -> Floats:
    return np.logaddexp(0, x)
