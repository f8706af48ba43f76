"""Products with weights that are read once for a few rows, as decoding does at every step.

The time of such a product is that of reading the weights, but libraries are made for many rows. Which way is fast
depends on the number of rows: ms for all products of GPT-2 small in float32, 2 cores of a Xeon with AVX-512, MKL as in
torch 2.13 (`python -m loadtests.products` prints it):

    rows  x @ W.T  x @ V  (W @ x.T).T
    1     25       23     26
    2     29       72     45
    4     50       73     45
    16    73       92     51
    32    89       108    58
    64    137      156    139
    128   242      256    239

with W [outputs, inputs] and V = W.T in memory of its own. In bfloat16 (the same command with `bfloat16`) one row takes
34 ms as x @ W.T and 26 as W @ x, two rows 28 and, as W @ x.T, 23.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CpuKind = Literal["amx", "avx512_bf16", "avx512", "avx2", "other"]


@cache
def cpu_kind() -> CpuKind:
    """The instructions of this CPU that decide which product is fast: the strongest that torch uses.

    ATEN_CPU_CAPABILITY=avx2 in the environment makes every x86 CPU "avx2".
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        return "avx2"
    if not capability.startswith("AVX512"):
        return "other"
    # torch has no public names for these two.
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return "amx"
    return "avx512_bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "avx512"


def default_compute_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype in which large matrix products are fast on a device: bfloat16 if it has units for it, else float32.

    A CPU without such units is 3 to 4 times slower in bfloat16 than in float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and cpu_kind() in ("amx", "avx512_bf16") else torch.float32


FEW_ROWS = range(3, 65)
"""Numbers of rows for which W @ x.T is the fastest on a CPU in float32; in bfloat16 it is for two rows as well."""
SMALL_BYTES = 8 << 20
"""Of float32 matrices up to this size there are two copies: V is read faster for one row."""


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x [n, inputs], weight [outputs, inputs], bias [outputs]: [n, outputs].

    The result may lie in memory column by column.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return F.linear(x, weight, bias)
    if x.dtype == torch.bfloat16 and len(x) == 1 and bias is not None:
        return torch.addmv(bias, weight, x[0])[None]
    if len(x) in FEW_ROWS or (x.dtype == torch.bfloat16 and len(x) == 2):
        return (weight @ x.t()).t() if bias is None else torch.addmm(bias[:, None], weight, x.t()).t()
    return F.linear(x, weight, bias)


class Linear:
    """A matrix and a bias, kept in the layouts that are fast."""

    def __init__(self, inputs_first: Tensor, bias: Tensor) -> None:
        """inputs_first [inputs, outputs], bias [outputs]."""
        self.weight = inputs_first.t().contiguous()
        self.bias = bias
        is_small = inputs_first.dtype == torch.float32 and inputs_first.nbytes <= SMALL_BYTES
        self._inputs_first = inputs_first.contiguous() if is_small and inputs_first.device.type == "cpu" else None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.weight.nbytes + self.bias.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[n, inputs] -> [n, outputs]; the result may lie in memory column by column."""
        if len(x) == 1 and self._inputs_first is not None:
            return torch.addmm(self.bias, x, self._inputs_first)
        return few_rows_linear(x, self.weight, self.bias)
