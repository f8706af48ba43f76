"""Measures products for few rows: `python -m loadtests.products [bfloat16]` (see linear.py)."""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS, D_MODEL, VOCABULARY = 12, 768, 50_257
ROWS = (1, 2, 4, 16, 32, 64, 128)
TURNS = 7


def measure(rows: int, weights: list[Tensor], inputs_first: list[Tensor]) -> list[float]:
    """Median ms of all products on `rows` rows: x @ W.T, x @ V, (W @ x.T).T, in turn; for one row also W @ x."""
    x = {width: torch.randn(rows, width, dtype=weights[0].dtype) for width in {weight.shape[1] for weight in weights}}
    ways: list[Callable[[], object]] = [
        lambda: [F.linear(x[weight.shape[1]], weight) for weight in weights],
        lambda: [x[weight.shape[0]] @ weight for weight in inputs_first],
        lambda: [(weight @ x[weight.shape[1]].t()).t() for weight in weights],
    ]
    if rows == 1:
        ways.append(lambda: [torch.mv(weight, x[weight.shape[1]][0]) for weight in weights])
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(TURNS + 1):
        for way, own in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            own.append(time.perf_counter() - began)
    return [1e3 * statistics.median(own[1:]) for own in seconds]


@torch.inference_mode()
def main() -> None:
    d, dtype = D_MODEL, torch.bfloat16 if "bfloat16" in sys.argv[1:] else torch.float32
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * LAYERS + [(VOCABULARY, d)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    inputs_first = [weight.t().contiguous() for weight in weights]
    print(f"ms of GPT-2 small's products in {dtype}, {torch.get_num_threads()} threads")
    print("rows  x @ W.T  x @ V  (W @ x.T).T  W @ x")
    for rows in ROWS:
        times = measure(rows, weights, inputs_first)
        print(
            f"{rows:<5} {times[0]:<8.0f} {times[1]:<6.0f} {times[2]:<12.0f} "
            + (f" {times[3]:.0f}" if rows == 1 else "")
        )


if __name__ == "__main__":
    main()
