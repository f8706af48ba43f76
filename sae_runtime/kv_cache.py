"""Keys and values of earlier tokens, kept per slot for incremental decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_runtime.packed import PackedTokens


class KVCache:
    """Preallocated keys and values: per layer [n_slots, n_heads, max_length, head_dim].

    A slot holds one row. The caller decides which row lives in which slot and counts its tokens
    (`PackedTokens.past`); a new row (past 0) may take over a slot at any time. Decoding runs over ranges of slots, so
    give new rows the lowest free slots. One forward at a time may use a cache.
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
    ) -> None:
        if n_slots < 1 or max_length < 1:
            raise ValueError(f"a cache needs at least one slot and one token; got {n_slots} slots of {max_length}")
        self.n_slots = n_slots
        self.max_length = max_length
        self._used = [0] * n_slots  # tokens ever written to each slot since it was last cleared
        shape = (n_layers, n_slots, n_heads, max_length, head_dim)
        # Ordinary tensors even when made under inference_mode: later forwards may run outside of it.
        with torch.inference_mode(False):
            self._keys = torch.zeros(shape, dtype=dtype, device=device)
            self._values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Memory that keys and values take, in bytes."""
        return 2 * self._keys.nbytes

    def admit(self, packed: PackedTokens) -> None:
        """Checks that a batch fits and makes its slots ready; called once a forward, before any `write`.

        Raises:
            ValueError: a slot does not exist, a row would outgrow its slot, or it claims more cached tokens than were
                written to its slot.
        """
        slots: Sequence[int] | None = packed.slots
        if slots is None:
            raise ValueError("a forward with a cache needs PackedTokens.slots")
        for slot, past, length in zip(slots, packed.past, packed.lengths, strict=True):
            if slot >= self.n_slots:
                raise ValueError(f"cache slot {slot} does not exist; there are {self.n_slots}")
            if past + length > self.max_length:
                raise ValueError(f"a row of {past + length} tokens does not fit a cache slot of {self.max_length}")
            if past > self._used[slot]:
                raise ValueError(f"cache slot {slot} holds {self._used[slot]} tokens, but the row's past is {past}")
        for slot, past, length in zip(slots, packed.past, packed.lengths, strict=True):
            end = past + length
            if past == 0 and self._used[slot] > end:
                # Masked places get weight 0, but 0 times NaN is NaN: a new row must not meet what another left behind.
                with torch.no_grad():
                    self._keys[:, slot, :, end : self._used[slot]] = 0
                    self._values[:, slot, :, end : self._used[slot]] = 0
                self._used[slot] = end
            self._used[slot] = max(self._used[slot], end)

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [N, n_heads, head_dim] of N tokens at slots [N], positions [N]."""
        with torch.no_grad():
            self._keys[layer][slots, :, positions] = keys
            self._values[layer][slots, :, positions] = values

    def read(self, layer: int, first_slot: int, n_slots: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of keys and values [n_slots, n_heads, length, head_dim] of consecutive slots."""
        window = (slice(first_slot, first_slot + n_slots), slice(None), slice(length))
        return self._keys[layer][window], self._values[layer][window]
