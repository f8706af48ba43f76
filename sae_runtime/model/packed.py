"""Packed batches: the tokens of several rows one after the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """B rows of tokens, N tokens in all. Row b holds `lengths[b]` tokens that follow `past[b]` cached ones.

    Raises:
        ValueError: the fields do not fit together, a row is empty, or a cache slot is named twice.
    """

    ids: Tensor
    """int64 [N], on any device."""
    lengths: tuple[int, ...]
    """B row lengths, each at least 1; their sum is N."""
    past: tuple[int, ...]
    """B counts of tokens that each row already has in its cache slot; 0 without a cache."""
    slots: tuple[int, ...] | None = None
    """B different cache slots, or None without a cache."""

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype != torch.int64:
            raise ValueError(f"packed ids are {self.ids.dtype} {list(self.ids.shape)}, expected int64 [N]")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"packed rows need at least one token each; lengths are {list(self.lengths)}")
        if sum(self.lengths) != len(self.ids):
            raise ValueError(f"row lengths sum to {sum(self.lengths)} but there are {len(self.ids)} tokens")
        if len(self.past) != len(self.lengths) or min(self.past) < 0:
            raise ValueError(f"past is {list(self.past)}, expected {len(self.lengths)} counts of cached tokens")
        if self.slots is None:
            if any(self.past):
                raise ValueError("rows with cached tokens (past > 0) need cache slots")
        elif len(self.slots) != len(self.lengths) or len(set(self.slots)) != len(self.slots) or min(self.slots) < 0:
            raise ValueError(f"slots are {list(self.slots)}, expected {len(self.lengths)} different slot numbers")

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[int]],
        *,
        past: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
    ) -> PackedTokens:
        """Packs rows of token ids; `past` and `slots` as in the fields (one entry a row)."""
        return cls(
            ids=torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64),
            lengths=tuple(map(len, rows)),
            past=(0,) * len(rows) if past is None else tuple(past),
            slots=None if slots is None else tuple(slots),
        )

    @property
    def one_token_each(self) -> bool:
        """Whether every row brings a single token, as when all decode."""
        return len(self.ids) == len(self.lengths)

    @cached_property
    def row_of_token(self) -> Tensor:
        """int64 [N], on the device of `ids`: the row that each token belongs to."""
        rows = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths), output_size=len(self.ids))
        return rows.to(self.ids.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [N], on the device of `ids`: position of each token in its row, counting cached tokens."""
        if self.one_token_each:
            return torch.tensor(self.past, device=self.ids.device)
        lengths = torch.tensor(self.lengths)
        # Row b's tokens start at cumsum(lengths)[b] - lengths[b] in the packing and at past[b] in the row.
        shift = torch.tensor(self.past) - (lengths.cumsum(0) - lengths)
        return torch.arange(len(self.ids), device=self.ids.device) + shift.to(self.ids.device)[self.row_of_token]

    @cached_property
    def row_ends(self) -> Tensor:
        """int64 [B], on the device of `ids`: index of each row's last token."""
        return (torch.tensor(self.lengths).cumsum(0) - 1).to(self.ids.device)

    def to(self, device: torch.device) -> PackedTokens:
        """The same batch with its tensors on `device` (itself when they are there)."""
        if self.ids.device == device:
            return self
        return PackedTokens(self.ids.to(device), self.lengths, self.past, self.slots)

    def __len__(self) -> int:
        return len(self.ids)
