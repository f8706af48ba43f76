"""Measures the encoders: `python -m loadtests.kernels [--json FILE]`.

Memory: a fresh process makes a dictionary of random weights and its input, then encodes; "peak extra" is the highest
resident set size of the process during the encode (VmHWM of /proc/self/status, reset before) less the size before it.
It so counts everything: temporary tensors, the packing buffers of the matrix product, and the result.

Speed: `Dictionary.encode` and dense pre-activations with torch.topk take turns on the same rows; rows/s are from the
median of each, and the ratio is between those medians, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.kernels.screened_topk import screening_is_fast

SPEED_SIZES = {  # name -> rows per turn, latents, width
    "131k_d768": (128, 131_072, 768),
    "32k_d768": (256, 32_768, 768),
    "4k_d256": (2048, 4_096, 256),
}
TURNS = 3


def measure_tiled_topk() -> dict[str, float]:
    """Peak extra memory (MB, 10^6 bytes) at 4,096 rows x 131,072 latents x d 768, and rows/s against dense top-k."""
    (peak,) = measure_peak(rows=4096, n_latents=131_072, d_in=768, k=32)
    return {"tiled_topk_peak_extra_mb": peak} | measure_speed()


def measure_peak(*, rows: int, n_latents: int, d_in: int, k: int, dense: bool = False) -> list[float]:
    """Peak extra MB of one encode in a fresh process; with `dense` then also of dense latents and torch.topk."""
    command = [sys.executable, "-m", "loadtests.kernels", "--peak", *map(str, (rows, n_latents, d_in, k))]
    output = subprocess.run(command + ["--dense"] * dense, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(line) for line in output.splitlines()]


def measure_speed() -> dict[str, float]:
    """rows/s of tiled and dense encoding, their ratio, the share of the tiled time beyond the matrix product, and the
    ratio of screened and dense encoding where the CPU has bfloat16 units."""
    figures: dict[str, float] = {}
    for name, (rows, n_latents, d_in) in SPEED_SIZES.items():
        dictionary, x = _example(rows, n_latents, d_in, k=32)
        tiled, dense, product, screened = _take_turns(
            partial(dictionary.encode, x),
            partial(_dense_topk, dictionary, x),
            partial(_product, dictionary, x),
            partial(dictionary.with_fast_encoder().encode, x),
        )
        figures[f"tiled_topk_rows_per_s.{name}"] = rows / tiled
        figures[f"dense_topk_rows_per_s.{name}"] = rows / dense
        figures[f"tiled_topk_vs_dense.{name}"] = dense / tiled
        figures[f"tiled_topk_selection_share.{name}"] = max(0.0, 1 - product / tiled)
        if screening_is_fast():
            figures[f"screened_topk_vs_dense.{name}"] = dense / screened
    return figures


def _example(rows: int, n_latents: int, d_in: int, k: int) -> tuple[Dictionary, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Filled in place: no temporary copy raises the peak before the measurement.
    encoder = torch.empty(n_latents, d_in).normal_(0, d_in**-0.5, generator=generator)
    dictionary = Dictionary(
        encoder=encoder,
        decoder=encoder,
        pre_bias=torch.zeros(d_in),
        latent_bias=torch.empty(n_latents).normal_(0, 0.1, generator=generator),
        activation="topk",
        k=k,
        normalization="layer_norm",
    )
    return dictionary, torch.empty(rows, d_in).normal_(0, 1, generator=generator)


def _dense_topk(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    assert dictionary.k is not None
    prepared, _ = dictionary.prepare(x)
    values, indices = torch.addmm(dictionary.latent_bias, prepared, dictionary.encoder.T).topk(dictionary.k, dim=-1)
    return values.relu(), indices


def _product(dictionary: Dictionary, x: Tensor) -> Tensor:
    prepared, _ = dictionary.prepare(x)
    return torch.addmm(dictionary.latent_bias, prepared, dictionary.encoder.T)


def _take_turns(*functions: Callable[[], object]) -> list[float]:
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(TURNS + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:  # the first one warms up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def _print_peak(rows: int, n_latents: int, d_in: int, k: int, dense: bool) -> None:
    dictionary, x = _example(rows, n_latents, d_in, k)
    dictionary.encode(x[:1])  # loads the matrix library, whose own memory is not the encoder's
    encoders: list[Callable[[], object]] = [partial(dictionary.encode, x)]
    if dense:
        encoders.append(partial(_dense_topk, dictionary, x))
    for encode in encoders:
        with suppress(OSError):  # resets VmHWM to the present size, where the kernel allows it
            Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        result = encode()
        print((_status_bytes("VmHWM") - before) / 1e6)
        del result


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--peak", type=int, nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        rows, n_latents, d_in, k = arguments.peak
        _print_peak(rows, n_latents, d_in, k, arguments.dense)
        return
    figures = measure_tiled_topk()
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:>12,.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
