"""Finds the large entries of a matrix by the maxima of groups of neighbours.

Few of a row's pre-activations are large, and looking at each by itself is slow. The maximum of each group is found
quickly, and then only those groups are looked into whose maximum is large enough. With k groups of a row known to have
a maximum of at least b, its k-th largest entry is at least b too: so the k-th largest maximum bounds the k-th largest
entry from below, and only a few more than k entries reach it.

Floats are compared as integers of the same bits: these are ordered like the floats where they are positive, and below
them where they are negative, and their maxima are quicker.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUP = 32
"""Most neighbours in a group. Any size is right; measured at k = 32."""
GROUPS_PER_K = 4
"""Least number of groups for each of the k entries that are sought: with fewer, nearly every group holds one."""
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def as_bits(values: Tensor) -> Tensor:
    """Floats of any shape as integers of the same memory."""
    return values.view(BITS[values.dtype])


def ordered_bits(values: Tensor) -> Tensor:
    """Integers that are ordered like the floats of any shape, negative ones too."""
    bits = as_bits(values + 0.0)  # a copy without -0, which equals 0
    info = torch.iinfo(bits.dtype)
    return bits.bitwise_xor_((bits >> (info.bits - 1)).bitwise_and_(info.max))  # negative floats count backwards


class Groups:
    """The entries of bits [n, m] (see `as_bits`) in groups of neighbours of a row, all of one size, and their maxima.

    On a GPU, where nothing is gained by them, groups are single entries.
    """

    def __init__(self, bits: Tensor, k: int = 1) -> None:
        """`k`: how many entries of a row are sought."""
        self.bits = bits
        m = bits.shape[1]
        size = GROUP if bits.device.type == "cpu" else 1
        while size > 1 and (m % size or m < size * GROUPS_PER_K * k):
            size //= 2
        self.size = size
        self.maxima = self._maxima()
        """[n, m / size]."""

    def _maxima(self) -> Tensor:
        if self.size == 1:
            return self.bits
        if self.bits.is_contiguous():
            return self.bits.view(len(self.bits), -1, self.size).amax(2)
        # In memory column by column, as some products leave it.
        return self.bits.t().view(-1, self.size, len(self.bits)).amax(1).t().contiguous()

    def kth_maximum(self, k: int) -> Tensor:
        """The k-th largest maximum of each row, [n, 1]: at most its k-th largest entry. There are k groups or more."""
        n_groups = self.maxima.shape[1]
        if self.bits.device.type != "cpu":
            return self.maxima.topk(k, dim=1).values[:, -1:]
        # NumPy's vectorised selection is several times faster there than torch.topk.
        return torch.from_numpy(np.partition(self.maxima.numpy(), n_groups - k, axis=1)[:, n_groups - k, None])

    def at_least(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns, int64, of the entries that reach a bound, row by row, in ascending order.

        bound: integers of the dtype of the bits, one (), one a row [n, 1] or one a column [m].
        """
        if self.bits.device.type != "cpu":
            rows, columns = (self.bits >= bound).nonzero(as_tuple=True)
            return rows, columns
        of_groups = bound.view(-1, self.size).amin(1) if bound.ndim == 1 else bound
        marked = np.flatnonzero((self.maxima >= of_groups).numpy())  # row by row
        row, group = np.divmod(marked, self.maxima.shape[1])
        if self.size == 1:
            return torch.from_numpy(row), torch.from_numpy(group)
        rows, groups = torch.from_numpy(row), torch.from_numpy(group)
        if self.bits.is_contiguous():
            members = self.bits.view(-1, self.size).index_select(0, torch.from_numpy(marked))
        else:
            members = self.bits.unflatten(1, (-1, self.size))[rows, groups]
        if bound.ndim == 2:
            bound = bound.index_select(0, rows)
        elif bound.ndim == 1:
            bound = bound.view(-1, self.size).index_select(0, groups)
        place, member = np.divmod(np.flatnonzero((members >= bound).numpy()), self.size)
        return torch.from_numpy(row[place]), torch.from_numpy(group[place] * self.size + member)
