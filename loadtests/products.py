"""Measures products with weights: `python -m loadtests.products [bfloat16] [--rows N ...]`.

It prints what the table of sae_runtime/kernels/products.py rests on: ms of all products of GPT-2 small on some rows,
computed as x @ W.T and as (W @ x.T).T; for one row also as W @ x. The ways take turns, and a figure is the median. Run
it on a machine that does nothing else; figures are in loadtests/README.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.kernels.products import cpu_kind

LAYERS, D_MODEL, VOCABULARY = 12, 768, 50_257
ROWS = (1, 2, 4, 16, 32, 64, 128, 256, 1024)
TURNS = 7


def measure(rows: int, weights: list[Tensor]) -> list[float]:
    """Median ms of all products on `rows` rows: x @ W.T and (W @ x.T).T, in turn; for one row also W @ x."""
    x = {width: torch.randn(rows, width, dtype=weights[0].dtype) for width in {weight.shape[1] for weight in weights}}
    ways: list[Callable[[], object]] = [
        lambda: [F.linear(x[weight.shape[1]], weight) for weight in weights],
        lambda: [(weight @ x[weight.shape[1]].t()).t() for weight in weights],
    ]
    if rows == 1:
        ways.append(lambda: [torch.mv(weight, x[weight.shape[1]][0]) for weight in weights])
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(TURNS + 1):
        for way, taken in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            taken.append(time.perf_counter() - began)
    return [1e3 * statistics.median(taken[1:]) for taken in seconds]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtype", nargs="?", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    arguments = parser.parse_args()
    d, dtype = D_MODEL, getattr(torch, arguments.dtype)
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * LAYERS + [(VOCABULARY, d)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    print(f"ms of GPT-2 small's products in {dtype}, {torch.get_num_threads()} threads, CPU of kind {cpu_kind()}")
    print("rows   x @ W.T  (W @ x.T).T  W @ x")
    for rows in arguments.rows:
        times = measure(rows, weights)
        print(
            f"{rows:<6} {times[0]:<8.0f} {times[1]:<12.0f} {times[2]:.0f}"
            if rows == 1
            else f"{rows:<6} {times[0]:<8.0f} {times[1]:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
