"""Causal self-attention over packed rows, with or without a cache.

Rows of one forward are sorted into groups once (`AttentionPlan.of`); every layer then runs one attention call a group:

- rows without a past, of like length: right-padded, plain causal attention (a real token never looks at the padding
  behind its row, so no mask is needed);
- rows with a past that bring one token (decoding): one call for rows at equal distances in the cache, with a mask
  (two rows always are; so are all of equal reservations);
- a row with a past that brings several tokens: a call of its own, with a mask.

Groups of like length are the middle between one padded batch (up to twice the work) and one call a row (hardly less
work, but every call waits for all threads, which is slow where cores are shared).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.model.kv_cache import KVCache
from sae_runtime.model.packed import PackedTokens

Indices = npt.NDArray[np.int64]

# A row joins a group whose longest row has T tokens when it has at least this share of T ...
_LIKE_LENGTH = 0.75
# ... or when T is at most this: attention over so few tokens costs less than another call.
_SHORT = 32
# Idle rows between two others that a decoding call may run over, rather than being cut in two.
_IDLE_ROWS = 2


@dataclass(frozen=True)
class _Group:
    """G rows padded to T tokens that share an attention call: places [start, start + G * T) of the padded layout."""

    start: int
    n_rows: int
    length: int
    first_place: int = 0
    stride: int = 0
    n_keys: int = 0
    """S: each row looks at the keys from the cache's place first_place + row * stride on; 0: at its own tokens'."""
    mask: Tensor | None = None
    """[G, 1, T, S], added to the scores over keys from the cache; None where every row's one token looks at all S."""


@dataclass(frozen=True)
class AttentionPlan:
    """How the rows of one forward attend; the same for every layer."""

    groups: tuple[_Group, ...]
    gather: Tensor | None
    """int64 [P]: the packed token at each place of the padded layout (P places); None when they are the same."""
    restore: Tensor | None
    """int64 [N]: the place of each packed token; None when they are the same."""
    places: Tensor | None
    """int64 [N]: the cache's place of each token; None without a cache."""

    @classmethod
    def of(cls, packed: PackedTokens, dtype: torch.dtype, cache: KVCache | None) -> AttentionPlan:
        """Plans for rows on `packed`'s device and makes their slots in the cache ready.

        `dtype` is that of queries, keys and values. ValueError: the rows do not fit the cache (see KVCache.admit).
        """
        device = packed.ids.device
        layout = _PaddedLayout(packed, dtype)
        for rows in _fresh_rows(packed):
            layout.add_fresh(rows)
        places = None
        if cache is not None:
            first_places, room = cache.admit(packed)
            for rows, stride in _cached_rows(packed, first_places, room):
                if packed.lengths[rows[0]] == 1:
                    layout.add_decoding(rows, first_places, stride)
                else:
                    layout.add_continued(rows[0], first_places[rows[0]])
            if packed.one_token_each:
                own_places = [first + past for first, past in zip(first_places, packed.past, strict=True)]
                places = torch.tensor(own_places, device=device)
            else:
                shift = np.repeat(np.array(first_places) + packed.past - layout.starts, packed.lengths)
                places = torch.from_numpy(np.arange(len(packed)) + shift).to(device)
        groups = tuple(layout.groups)
        if layout.is_packing:
            return cls(groups, None, None, places)
        return cls(groups, torch.tensor(layout.gather, device=device), layout.restore().to(device), places)

    def attend(self, qkv: Tensor, n_heads: int, scale: float, layer: int, cache: KVCache | None) -> Tensor:
        """Causal attention of every row over itself and its cached past.

        Args:
            qkv: queries, keys and values side by side, [N, 3 * d_model], packed.
            scale: factor of the scores.
            layer: where in `cache` keys and values are read and written.

        Returns:
            [N, d_model], heads side by side, packed.
        """
        d_model = qkv.shape[1] // 3
        head_dim = d_model // n_heads
        if cache is not None:
            assert self.places is not None
            cache.write(layer, self.places, qkv.view(-1, 3 * n_heads, head_dim)[:, n_heads:])
        padded = qkv if self.gather is None else qkv.index_select(0, self.gather)  # [P, 3 * d_model]
        outputs = []
        for group in self.groups:
            g, t = group.n_rows, group.length
            part = padded[group.start : group.start + g * t].view(g, t, 3, n_heads, head_dim)
            q, k, v = part.permute(2, 0, 3, 1, 4)  # each [G, n_heads, T, head_dim]
            if not group.n_keys:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            else:
                assert cache is not None
                k, v = cache.read(layer, group.first_place, group.stride, g, group.n_keys)
                # each [G, n_heads, S, head_dim]
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)
            outputs.append(out.transpose(1, 2).reshape(g * t, d_model))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined if self.restore is None else joined.index_select(0, self.restore)


class _PaddedLayout:
    """The groups of a forward, and which token is at each place of them.

    For rows that decode it counts in lists: arrays of so few numbers take several times longer, once a token.
    """

    def __init__(self, packed: PackedTokens, dtype: torch.dtype) -> None:
        self._packed, self._dtype = packed, dtype
        self.groups: list[_Group] = []
        self.gather: list[int] = []  # the packed token at each place
        self._tokens: list[Sequence[int] | Indices] = []  # of each group
        self._places: list[Sequence[int] | Indices] = []  # of these tokens

    @cached_property
    def starts(self) -> Indices:
        """[B] each row's first token in the packing."""
        lengths = np.array(self._packed.lengths)
        starts: Indices = lengths.cumsum() - lengths
        return starts

    @property
    def is_packing(self) -> bool:
        """Whether every token's place is its own in the packing."""
        return self.gather == list(range(len(self._packed)))

    def restore(self) -> Tensor:
        """int64 [N]: the place of each packed token."""
        restore = np.empty(len(self._packed), np.int64)
        for group, tokens, places in zip(self.groups, self._tokens, self._places, strict=True):
            restore[tokens] = group.start + np.asarray(places)
        return torch.from_numpy(restore)

    def add_fresh(self, rows: list[int]) -> None:
        """Rows without a past, the longest first."""
        lengths = np.array([self._packed.lengths[row] for row in rows])[:, None]
        token = np.arange(lengths[0, 0])  # [T]
        # A padded place repeats its own row's last token: what is wrong in one row stays in that row.
        tokens = self.starts[rows, None] + np.minimum(token, lengths - 1)  # [G, T]
        real = token < lengths
        self._add(_Group(self._end, len(rows), len(token)), tokens.ravel().tolist(), tokens[real], np.flatnonzero(real))

    def add_continued(self, row: int, first_place: int) -> None:
        """A row with a past that brings several tokens; `first_place` is where it begins in the cache."""
        past, token = self._packed.past[row], np.arange(self._packed.lengths[row])
        n_keys = past + len(token)
        mask = self._mask(np.arange(n_keys) > (past + token)[:, None])[None, None]
        tokens = int(self.starts[row]) + token
        group = _Group(self._end, 1, len(token), first_place, 0, n_keys, mask)
        self._add(group, tokens.tolist(), tokens, token)

    def add_decoding(self, rows: list[int], first_places: Sequence[int], stride: int) -> None:
        """Rows that bring one token each; `first_places` of all rows. Those of idle rows are between theirs."""
        first = first_places[rows[0]]
        padded = [(first_places[row] - first) // stride for row in rows] if stride else [0]
        past = [self._packed.past[row] for row in rows]
        n_rows, n_keys, mask = padded[-1] + 1, max(past) + 1, None
        if min(past) + 1 < n_keys:
            last = np.full((n_rows, 1), n_keys)  # idle rows keep an open mask; nobody reads their result
            last[padded, 0] = past
            mask = self._mask(np.arange(n_keys) > last)[:, None, None]
        tokens = rows if self._packed.one_token_each else self.starts[rows].tolist()
        gather = [0] * n_rows
        for place, token in zip(padded, tokens, strict=True):
            gather[place] = token
        group = _Group(self._end, n_rows, 1, first, stride, n_keys, mask)
        self._add(group, gather, tokens, padded)

    @property
    def _end(self) -> int:
        """Places so far."""
        return len(self.gather)

    def _add(
        self, group: _Group, gather: list[int], tokens: Sequence[int] | Indices, places: Sequence[int] | Indices
    ) -> None:
        """`gather`: the token of each of its places; `places`, among them, of its `tokens`."""
        self.groups.append(group)
        self.gather += gather
        self._tokens.append(tokens)
        self._places.append(places)

    def _mask(self, hidden: npt.NDArray[np.bool_]) -> Tensor:
        scores = np.where(hidden, np.float32("-inf"), np.float32(0))
        return torch.from_numpy(scores).to(self._packed.ids.device, self._dtype)


def _fresh_rows(packed: PackedTokens) -> list[list[int]]:
    """Rows without a past in groups of like length, by falling length."""
    groups: list[list[int]] = []
    lengths, past = packed.lengths, packed.past
    for row in sorted((r for r, p in enumerate(past) if p == 0), key=lambda r: -lengths[r]):
        longest = lengths[groups[-1][0]] if groups else 0
        if longest and (longest <= _SHORT or lengths[row] >= _LIKE_LENGTH * longest):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _cached_rows(packed: PackedTokens, first_places: Sequence[int], room: Sequence[int]) -> list[tuple[list[int], int]]:
    """Rows with a past in groups, by rising place in the cache, with the distance of neighbours in a group.

    A group's rows start at multiples of that distance, and the longest is not longer than any one's room: the keys that
    a row's call looks at end before another row's begin, so that what is wrong in one row stays in that row.
    """
    lengths, past = packed.lengths, packed.past
    groups: list[tuple[list[int], int]] = []
    decoding: list[int] = []
    for row, n in enumerate(past):
        if n and lengths[row] == 1:
            decoding.append(row)
        elif n:
            groups.append(([row], 0))
    rows: list[int] = []
    stride = longest = shortest_room = 0
    for row in sorted(decoding, key=first_places.__getitem__):
        n_keys, own_room = past[row] + 1, room[row]
        if rows:
            distance = first_places[row] - first_places[rows[-1]]
            even = not stride or (distance % stride == 0 and distance <= (1 + _IDLE_ROWS) * stride)
            if even and max(longest, n_keys) <= min(shortest_room, own_room):
                rows.append(row)
                stride = stride or distance
                longest, shortest_room = max(longest, n_keys), min(shortest_room, own_room)
                continue
            groups.append((rows, stride))
        rows, stride, longest, shortest_room = [row], 0, n_keys, own_room
    if rows:
        groups.append((rows, stride))
    return groups
