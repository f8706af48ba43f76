"""Keys and values of earlier tokens, kept for incremental decoding in an arena of a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_runtime.model.packed import PackedTokens


@dataclass(slots=True)
class _Region:
    """Consecutive places of the arena that one slot owns."""

    start: int
    size: int
    used: int = 0
    """Places from the start that have been written."""
    room: int = 0
    """Places from the start up to the next region or the arena's end."""

    @property
    def end(self) -> int:
        return self.start + self.size


class KVCache:
    """Preallocated keys and values of `max_tokens` tokens: per layer [2 * n_heads, max_tokens, head_dim], keys first.

    A slot holds one row, in consecutive places of the arena. The caller decides which row lives in which slot and
    counts its tokens (`PackedTokens.past`); a new row (past 0) may take over a slot at any time. Without `max_tokens`
    every slot has `max_length` places for good. With it a slot has those that `reserve` gave it until `release`: rows
    of any lengths share the arena, and moving rows together makes one piece of the free places when that is needed.

    Places that no token was written to are zero, so that a masked place never holds another row's NaN (its weight of 0
    would not hide that). One forward at a time may use a cache.
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
            raise ValueError(f"a cache needs room for at least one token; max_tokens is {max_tokens}")
        self.n_slots = n_slots
        self.max_length = max_length
        self.max_tokens = n_slots * max_length if max_tokens is None else max_tokens
        self._regions: dict[int, _Region] = {}
        if max_tokens is None:
            self._regions = {slot: _Region(slot * max_length, max_length) for slot in range(n_slots)}
            self._measure_room()
        # An ordinary tensor even when made under inference_mode: later forwards may run outside of it.
        with torch.inference_mode(False):
            self._arena = torch.zeros(n_layers, 2 * n_heads, self.max_tokens, head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Memory that keys and values take, in bytes."""
        return self._arena.nbytes

    @property
    def free_tokens(self) -> int:
        """Places that no slot has reserved."""
        return self.max_tokens - sum(region.size for region in self._regions.values())

    # Whose places are whose

    def reserve(self, slot: int, n_tokens: int) -> None:
        """Gives a slot places for a row of up to `n_tokens`; moves other rows together if the free places are apart.

        Raises:
            ValueError: the slot does not exist or has places already, a row of that length is not allowed, or fewer
                places are free.
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
        start = self._hole(n_tokens)
        if start is None:
            self._move_together()
            start = self._hole(n_tokens)
            assert start is not None, "the free places are in one piece now"
        self._regions[slot] = _Region(start, n_tokens)
        self._measure_room()

    def release(self, slot: int) -> None:
        """Takes a slot's places back; what they held is gone.

        Raises:
            ValueError: the slot has no places.
        """
        region = self._regions.pop(slot, None)
        if region is None:
            raise ValueError(f"cache slot {slot} has no tokens reserved")
        self._zero(region.start, region.start + region.used)
        self._measure_room()

    def copy(self, source: int, targets: Sequence[int], n_tokens: int) -> None:
        """Gives each target slot the first `n_tokens` tokens of the source slot's row.

        Raises:
            ValueError: a slot has no places or too few, or the source holds fewer tokens.
        """
        origin = self._region(source)
        if n_tokens > origin.used:
            raise ValueError(f"cache slot {source} holds {origin.used} tokens, not {n_tokens}")
        taken = slice(origin.start, origin.start + n_tokens)
        with torch.no_grad():
            for slot in targets:
                region = self._region(slot)
                if n_tokens > region.size:
                    raise ValueError(f"a row of {n_tokens} tokens does not fit a cache slot of {region.size}")
                place = slice(region.start, region.start + n_tokens)
                self._arena[:, :, place] = self._arena[:, :, taken]
                self._zero(region.start + n_tokens, region.start + region.used)
                region.used = n_tokens

    def _region(self, slot: int) -> _Region:
        if not 0 <= slot < self.n_slots:
            raise ValueError(f"cache slot {slot} does not exist; there are {self.n_slots}")
        region = self._regions.get(slot)
        if region is None:
            raise ValueError(f"cache slot {slot} has no tokens reserved")
        return region

    def _by_place(self) -> list[_Region]:
        return sorted(self._regions.values(), key=lambda region: region.start)

    def _measure_room(self) -> None:
        end = self.max_tokens
        for region in reversed(self._by_place()):
            region.room = end - region.start
            end = region.start

    def _hole(self, n_tokens: int) -> int | None:
        """The first of `n_tokens` free places in a row."""
        start = 0
        for region in self._by_place():
            if region.start - start >= n_tokens:
                return start
            start = region.end
        return start if self.max_tokens - start >= n_tokens else None

    def _move_together(self) -> None:
        start = 0
        with torch.no_grad():
            for region in self._by_place():
                if region.start > start:
                    old, new = slice(region.start, region.start + region.used), slice(start, start + region.used)
                    for layer in self._arena:  # one layer at a time: the copy that keeps overlaps right stays small
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
            The arena's place of each of the B rows' first token, and how many places from there on are not another
            slot's.

        Raises:
            ValueError: a slot does not exist or has no places, a row would outgrow its slot, or it claims more cached
                tokens than were written to its slot.
        """
        if packed.slots is None:
            raise ValueError("a forward with a cache needs PackedTokens.slots")
        regions = [self._region(slot) for slot in packed.slots]
        for slot, region, past, length in zip(packed.slots, regions, packed.past, packed.lengths, strict=True):
            if past + length > region.size:
                raise ValueError(f"a row of {past + length} tokens does not fit a cache slot of {region.size}")
            if past > region.used:
                raise ValueError(f"cache slot {slot} holds {region.used} tokens, but the row's past is {past}")
        for region, past, length in zip(regions, packed.past, packed.lengths, strict=True):
            end = past + length
            if past == 0 and region.used > end:  # another row's tokens
                self._zero(region.start + end, region.start + region.used)
                region.used = end
            region.used = max(region.used, end)
        return [region.start for region in regions], [region.room for region in regions]

    def write(self, layer: int, places: Tensor, keys_values: Tensor) -> None:
        """Stores keys and values [N, 2 * n_heads, head_dim] of N tokens at the arena's places int64 [N]."""
        with torch.no_grad():
            self._arena[layer].index_copy_(1, places, keys_values.transpose(0, 1))

    def read(self, layer: int, start: int, stride: int, n_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of keys and values [n_rows, n_heads, length, head_dim], of rows that start at start + i * stride."""
        both = self._arena[layer]
        n_heads, head_dim = len(both) // 2, both.shape[2]
        size = (n_rows, n_heads, length, head_dim)
        step = (stride * head_dim, both.stride(0), head_dim, 1)
        first = both.storage_offset() + start * head_dim
        return both.as_strided(size, step, first), both.as_strided(size, step, first + n_heads * both.stride(0))
