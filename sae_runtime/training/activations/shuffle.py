"""A bounded, shuffled buffer of activations: neighbours in the text do not meet in the same training batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sae_runtime.model.sites import Site


class ShuffleBuffer:
    """Gives out random batches of a stream of tokens' activations; half of the buffer is replaced at a time.

    The buffer is filled to `capacity` tokens and given out in a random order without replacement. When half of it is
    used, the used places are overwritten with the next tokens of the stream and the whole is shuffled anew, so a token
    meets others from several buffers' length around it. All sites have the same order: place i of every site is the
    same token. Memory: capacity × (sum of the sites' widths), allocated once, and one chunk of the stream.
    """

    def __init__(
        self,
        stream: Iterator[Mapping[Site, Tensor]],
        capacity: int,
        *,
        seed: int,
        device: torch.device | str | None = None,
    ) -> None:
        """`stream` yields [n, width] for each site, of any n; it may end, and then the rest is given out.

        The buffer lives on `device`, or where the stream's tensors are.
        """
        self._stream = stream
        self._capacity = capacity
        self._device = None if device is None else torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._held: dict[Site, Tensor] = {}  # [capacity, width] each; empty until the first chunk
        self._order = torch.empty(0, dtype=torch.int64)  # places in the order they are given out
        self._cursor = 0  # entries of _order that were given out
        self._chunk: dict[Site, Tensor] | None = None  # what did not fit of the last chunk

    def next_batch(self, size: int) -> dict[Site, Tensor]:
        """The next [size, width] of each site.

        Raises:
            ValueError: the batch is larger than half the buffer.
            StopIteration: fewer than `size` tokens are left in the buffer and the stream.
        """
        if 2 * size > self._capacity:
            raise ValueError(f"a batch of {size} rows needs a buffer of {2 * size}, this one holds {self._capacity}")
        if self._cursor + size > len(self._order) - self._capacity // 2:
            self._refill()
        if self._cursor + size > len(self._order):
            raise StopIteration
        batch = self._at(self._order[self._cursor : self._cursor + size])
        self._cursor += size
        return batch

    def peek(self, size: int) -> dict[Site, Tensor]:
        """Up to `size` of the tokens that come next, without taking them.

        Raises:
            ValueError: the stream is empty.
        """
        if not self._held:
            self._refill()
        if not self._held:
            raise ValueError("the stream of activations is empty")
        return self._at(self._order[self._cursor : self._cursor + size])

    def _at(self, places: Tensor) -> dict[Site, Tensor]:
        return {site: held[places.to(held.device)] for site, held in self._held.items()}

    def _refill(self) -> None:
        unused = self._order[self._cursor :]
        free = self._order[: self._cursor] if self._held else torch.arange(self._capacity)
        filled = 0
        while filled < len(free):
            chunk = self._chunk if self._chunk is not None else next(self._stream, None)
            self._chunk = None
            if chunk is None:
                break
            length = len(next(iter(chunk.values())))
            taken = min(length, len(free) - filled)
            places = free[filled : filled + taken]
            for site, activations in chunk.items():
                if site not in self._held:
                    self._held[site] = activations.new_empty(
                        self._capacity, activations.shape[1], device=self._device or activations.device
                    )
                held = self._held[site]
                held[places.to(held.device)] = activations[:taken].to(held.device)
            filled += taken
            if taken < length:
                # the clone lets go of the rest of the chunk
                self._chunk = {site: activations[taken:].clone() for site, activations in chunk.items()}
        kept = torch.cat([unused, free[:filled]])
        self._order = kept[torch.randperm(len(kept), generator=self._generator)]
        self._cursor = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything but the position of the stream. The tensors are not copied: save them before the next batch."""
        return {
            "held": {str(site): held for site, held in self._held.items()},
            "order": self._order,
            "cursor": self._cursor,
            "chunk": None
            if self._chunk is None
            else {str(site): activations for site, activations in self._chunk.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the tensors of `state`."""
        self._held = {Site.parse(site): self._placed(held) for site, held in state["held"].items()}
        self._order, self._cursor = state["order"].cpu(), state["cursor"]
        chunk = state["chunk"]
        self._chunk = None if chunk is None else {Site.parse(site): activations for site, activations in chunk.items()}
        self._generator.set_state(state["generator"].cpu())

    def _placed(self, held: Tensor) -> Tensor:
        return held if self._device is None else held.to(self._device)
