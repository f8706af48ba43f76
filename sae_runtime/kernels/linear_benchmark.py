"""Measures products for few rows, as in linear.py's head: `python -m sae_runtime.kernels.linear_benchmark`."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS, D_MODEL, VOCABULARY = 12, 768, 50_257
ROWS = (1, 2, 4, 16, 32, 64, 128)
TURNS = 7


def measure(rows: int, weights: list[Tensor], inputs_first: list[Tensor]) -> list[float]:
    """Median ms of all products on `rows` rows: x @ W.T, x @ V, (W @ x.T).T, which take turns."""
    x = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in weights}}
    ways: list[Callable[[], object]] = [
        lambda: [F.linear(x[weight.shape[1]], weight) for weight in weights],
        lambda: [x[weight.shape[0]] @ weight for weight in inputs_first],
        lambda: [(weight @ x[weight.shape[1]].t()).t() for weight in weights],
    ]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(TURNS + 1):
        for way, own in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            own.append(time.perf_counter() - began)
    return [1e3 * statistics.median(own[1:]) for own in seconds]


@torch.inference_mode()
def main() -> None:
    d = D_MODEL
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * LAYERS + [(VOCABULARY, d)]
    weights = [torch.randn(shape) for shape in shapes]
    inputs_first = [weight.t().contiguous() for weight in weights]
    print(
        f"ms of GPT-2 small's products in float32, {torch.get_num_threads()} threads\nrows  x @ W.T  x @ V  (W @ x.T).T"
    )
    for rows in ROWS:
        print("{:<5} {:<8.0f} {:<6.0f} {:.0f}".format(rows, *measure(rows, weights, inputs_first)))


if __name__ == "__main__":
    main()
