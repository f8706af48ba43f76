"""Products with weights: which way is fast on this CPU, and in which dtype.

`x @ W.T` and `(W @ x.T).T` are the same product, and libraries are quick in one or the other: the time of a product
with few rows is that of reading the weights once, but libraries are made for many rows. Which way is fast depends on
the number of rows and on the kind of CPU; the choice is a table, so that it is the same at every start and results can
be reproduced. `python -m loadtests.products` prints the times that it rests on; they are in loadtests/README.md.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CpuKind = Literal["amx", "avx512_bf16", "avx512", "avx2", "other"]

WEIGHT_FIRST: dict[CpuKind, range] = {
    "amx": range(3, 65),
    "avx512_bf16": range(3, 65),
    "avx512": range(3, 65),
    "avx2": range(2, 1025),
    "other": range(0),
}
"""Numbers of rows for which W @ x.T is the faster way in float32."""


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x [n, inputs], weight [outputs, inputs], bias [outputs]: [n, outputs].

    The result may lie in memory column by column. `memory`, flat with n * outputs elements or more, takes the result of
    a product with a bias; no gradient passes it.
    """
    n, outputs = len(x), len(weight)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and n == 1 and bias is not None and memory is None:
        return torch.addmv(bias, weight, x[0])[None]
    weight_first = _weight_first(x)
    if bias is None:
        return (weight @ x.t()).t() if weight_first else F.linear(x, weight)
    if memory is None:
        return torch.addmm(bias[:, None], weight, x.t()).t() if weight_first else F.linear(x, weight, bias)
    memory = memory[: n * outputs]
    if weight_first:
        return torch.addmm(bias[:, None], weight, x.t(), out=memory.view(outputs, n)).t()
    return torch.addmm(bias, x, weight.t(), out=memory.view(n, outputs))


def _weight_first(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    rows = WEIGHT_FIRST[cpu_kind()]
    return len(x) in rows or (x.dtype == torch.bfloat16 and len(x) == 2 and len(rows) > 0)
