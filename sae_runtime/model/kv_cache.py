"""Keys and values of earlier tokens, kept for incremental decoding in an arena of a fixed number of tokens.

Each layer's arena has `max_tokens` cells. A cell holds the keys and values of one token. A slot holds one row, in
consecutive cells, its region:

    cell      0   1   2   3   4   5   6   7   8   9  10  11  12  13
            | k   k   k   .   . | .   . | k   k   k   k   k | .   . |
            | slot 2's region   | free  | slot 0's region   | free  |

    slot 2    start 0, size 5, filled 3, n_readable 7
    slot 0    start 7, size 5, filled 5, n_readable 7

k is a cell that a token was written to, and a dot one that holds zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.model.packed import PackedTokens


@dataclass(slots=True)
class _Region:
    """Consecutive cells of the arena that one slot owns."""

    start: int
    size: int
    filled: int = 0
    """Cells from the start that have been written."""
    n_readable: int = 0
    """Cells from the start up to the next region or the arena's end: none of them is another slot's."""

    @property
    def end(self) -> int:
        return self.start + self.size


class KVCache:
    """Preallocated keys and values of `max_tokens` tokens: per layer [2 * n_heads, max_tokens, head_dim], keys first.

    The caller decides which row lives in which slot and counts its tokens (`PackedTokens.past`). A new row (past 0) may
    take over a slot at any time. Without `max_tokens` every slot keeps a region of `max_length` cells. With it a slot
    has a region from `reserve` to `release`: rows of any lengths share the arena, and rows are moved together when the
    free cells lie too far apart.

    Cells that no token was written to are zero. A masked cell therefore never holds another row's NaN, which its weight
    of 0 would not hide. Only one forward at a time may use a cache.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        n_slots: int,
        n_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int | None = None,
    ) -> None:
        if n_slots < 1 or max_length < 1:
            raise ValueError(f"a cache needs at least one slot and one token; got {n_slots} slots of {max_length}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"a cache must hold at least one token; max_tokens is {max_tokens}")
        self.n_slots = n_slots
        self.max_length = max_length
        self.max_tokens = n_slots * max_length if max_tokens is None else max_tokens
        self._regions: dict[int, _Region] = {}
        if max_tokens is None:
            self._regions = {slot: _Region(slot * max_length, max_length) for slot in range(n_slots)}
            self._count_readable()
        # An ordinary tensor even when made under inference_mode: later forwards may run outside of it.
        with torch.inference_mode(False):
            self._arena = torch.zeros(n_layers, 2 * n_heads, self.max_tokens, head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Memory that keys and values take, in bytes."""
        return self._arena.nbytes

    @property
    def free_tokens(self) -> int:
        """Cells that no slot has reserved."""
        return self.max_tokens - sum(region.size for region in self._regions.values())

    # Which cells belong to which slot

    def reserve(self, slot: int, n_tokens: int) -> None:
        """Gives a slot a region for a row of up to `n_tokens`; moves other rows together if no free gap is long enough.

        Raises:
            ValueError: the slot does not exist or has a region already, a row of that length is not allowed, or fewer
                cells are free.
        """
        if not 0 <= slot < self.n_slots:
            raise ValueError(f"cache slot {slot} does not exist; there are {self.n_slots}")
        if slot in self._regions:
            raise ValueError(f"cache slot {slot} has {self._regions[slot].size} tokens reserved already")
        if not 1 <= n_tokens <= self.max_length:
            raise ValueError(f"a slot cannot hold {n_tokens} tokens, expected 1 to {self.max_length}")
        free = self.free_tokens
        if n_tokens > free:
            raise ValueError(f"{n_tokens} tokens do not fit the cache: {free} of {self.max_tokens} are free")
        start = self._find_gap(n_tokens)
        if start is None:
            self._compact()
            start = self._find_gap(n_tokens)
            assert start is not None, "all free cells are in one gap now"
        self._regions[slot] = _Region(start, n_tokens)
        self._count_readable()

    def release(self, slot: int) -> None:
        """Takes a slot's region back and erases it.

        Raises:
            ValueError: the slot has no region.
        """
        region = self._regions.pop(slot, None)
        if region is None:
            raise ValueError(f"cache slot {slot} has no tokens reserved")
        self._zero(region.start, region.start + region.filled)
        self._count_readable()

    def copy(self, source: int, targets: Sequence[int], n_tokens: int) -> None:
        """Gives each target slot the first `n_tokens` tokens of the source slot's row.

        Raises:
            ValueError: a slot has no region or one that is too small, or the source holds fewer tokens.
        """
        source_region = self._region(source)
        if n_tokens > source_region.filled:
            raise ValueError(f"cache slot {source} holds {source_region.filled} tokens, not {n_tokens}")
        source_cells = slice(source_region.start, source_region.start + n_tokens)
        with torch.no_grad():
            for slot in targets:
                region = self._region(slot)
                if n_tokens > region.size:
                    raise ValueError(f"a row of {n_tokens} tokens does not fit a cache slot of {region.size}")
                target_cells = slice(region.start, region.start + n_tokens)
                self._arena[:, :, target_cells] = self._arena[:, :, source_cells]
                self._zero(region.start + n_tokens, region.start + region.filled)
                region.filled = n_tokens

    def _region(self, slot: int) -> _Region:
        if not 0 <= slot < self.n_slots:
            raise ValueError(f"cache slot {slot} does not exist; there are {self.n_slots}")
        region = self._regions.get(slot)
        if region is None:
            raise ValueError(f"cache slot {slot} has no tokens reserved")
        return region

    def _in_order(self) -> list[_Region]:
        return sorted(self._regions.values(), key=lambda region: region.start)

    def _count_readable(self) -> None:
        end = self.max_tokens
        for region in reversed(self._in_order()):
            region.n_readable = end - region.start
            end = region.start

    def _find_gap(self, n_tokens: int) -> int | None:
        """The first cell of the first gap of at least `n_tokens` free cells; None if there is no such gap."""
        start = 0
        for region in self._in_order():
            if region.start - start >= n_tokens:
                return start
            start = region.end
        return start if self.max_tokens - start >= n_tokens else None

    def _compact(self) -> None:
        """Moves all regions to the arena's start, in their order, so that the free cells are one gap at its end."""
        start = 0
        with torch.no_grad():
            for region in self._in_order():
                if region.start > start:
                    old, new = slice(region.start, region.start + region.filled), slice(start, start + region.filled)
                    for layer in self._arena:
                        # Old and new cells may overlap, so the copy goes through a clone, kept small by taking one
                        # layer at a time.
                        layer[:, new] = layer[:, old].clone()
                    self._zero(max(old.start, new.stop), old.stop)
                    region.start = start
                start = region.end

    def _zero(self, start: int, end: int) -> None:
        if end > start:
            with torch.no_grad():
                self._arena[:, :, start:end] = 0

    # A forward's view

    def admit(self, packed: PackedTokens) -> tuple[list[int], list[int]]:
        """Checks that a batch fits and makes its slots ready; called once a forward, before any `write`.

        Returns:
            For each of the B rows, the cell of its first token, and the number of cells from there up to the next
            slot's region.

        Raises:
            ValueError: a slot does not exist or has no region, a row would outgrow its region, or it claims more cached
                tokens than were written to its slot.
        """
        if packed.slots is None:
            raise ValueError("a forward with a cache needs PackedTokens.slots")
        regions = [self._region(slot) for slot in packed.slots]
        for slot, region, past, length in zip(packed.slots, regions, packed.past, packed.lengths, strict=True):
            if past + length > region.size:
                raise ValueError(f"a row of {past + length} tokens does not fit a cache slot of {region.size}")
            if past > region.filled:
                raise ValueError(f"cache slot {slot} holds {region.filled} tokens, but the row's past is {past}")
        for region, past, length in zip(regions, packed.past, packed.lengths, strict=True):
            end = past + length
            if past == 0 and region.filled > end:  # the tokens of the row that had the slot before
                self._zero(region.start + end, region.start + region.filled)
                region.filled = end
            region.filled = max(region.filled, end)
        return [region.start for region in regions], [region.n_readable for region in regions]

    def write(self, layer: int, cells: Tensor, keys_values: Tensor) -> None:
        """Stores keys and values [N, 2 * n_heads, head_dim] of N tokens in cells int64 [N]."""
        with torch.no_grad():
            self._arena[layer].index_copy_(1, cells, keys_values.transpose(0, 1))

    def read(self, layer: int, start: int, stride: int, n_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of keys and values [n_rows, n_heads, length, head_dim]; row i begins at cell start + i * stride."""
        both = self._arena[layer]
        n_heads, head_dim = len(both) // 2, both.shape[2]
        # In storage, head h of cell c begins at h * max_tokens * head_dim + c * head_dim; values follow all keys.
        size = (n_rows, n_heads, length, head_dim)
        step = (stride * head_dim, both.stride(0), head_dim, 1)
        first = both.storage_offset() + start * head_dim
        return both.as_strided(size, step, first), both.as_strided(size, step, first + n_heads * both.stride(0))
