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

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.kv_cache import KVCache
from sae_runtime.packed import PackedTokens

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
        # Index arithmetic over a few rows: numpy does it several times faster than torch.
        lengths, past = np.array(packed.lengths), np.array(packed.past)
        starts = lengths.cumsum() - lengths
        groups: list[_Group] = []
        gather: list[npt.NDArray[np.int64]] = []
        restore = np.empty(len(packed), np.int64)
        n_places = 0
        cached_at = None if cache is None else cache.admit(packed)

        def add_group(rows: list[int], place_of_row: npt.NDArray[np.int64], cached: tuple[int, int] | None) -> None:
            """Adds a group whose padded rows `place_of_row` hold the packed `rows`; other padded rows are idle."""
            nonlocal n_places
            length, n_rows = int(lengths[rows].max()), int(place_of_row[-1]) + 1
            token = np.arange(length)  # [T]
            # A padded place repeats its own row's last token: what is wrong in one row stays in that row.
            index = starts[rows, None] + np.minimum(token, lengths[rows, None] - 1)  # [rows, T]
            padded = np.zeros((n_rows, length), np.int64)
            padded[place_of_row] = index
            real = token < lengths[rows, None]
            restore[index[real]] = (n_places + place_of_row[:, None] * length + token)[real]
            gather.append(padded.ravel())
            mask, n_keys = None, 0
            if cached is not None:
                ends = past[rows] + lengths[rows]
                n_keys = int(ends.max())
            if cached is not None and (length > 1 or ends.min() < n_keys):
                # Idle slots in the range keep an open mask; nobody reads their result.
                scores = np.zeros((n_rows, 1, length, n_keys), np.float32)
                hidden = np.arange(n_keys) > (past[rows, None] + token)[:, :, None]  # [rows, T, S]
                scores[place_of_row, 0] = np.where(hidden, np.float32("-inf"), np.float32(0))
                mask = torch.from_numpy(scores).to(device, dtype)
            groups.append(_Group(n_places, n_rows, length, *(cached or (0, 0)), n_keys, mask))
            n_places += n_rows * length

        for rows in _fresh_rows(packed):
            add_group(rows, np.arange(len(rows)), None)
        places = None
        if cached_at is not None:
            first_places, room = cached_at
            for rows, stride in _cached_rows(packed, first_places, room):
                start = int(first_places[rows[0]])
                add_group(rows, (first_places[rows] - start) // max(stride, 1), (start, stride))
            shift = np.repeat(first_places + past - starts, lengths)
            places = torch.from_numpy(np.arange(len(packed)) + shift).to(device)

        order = np.concatenate(gather)
        same = np.array_equal(order, np.arange(len(packed)))
        return cls(
            groups=tuple(groups),
            gather=None if same else torch.from_numpy(order).to(device),
            restore=None if same else torch.from_numpy(restore).to(device),
            places=places,
        )

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


def _cached_rows(
    packed: PackedTokens, first_places: npt.NDArray[np.int64], room: npt.NDArray[np.int64]
) -> list[tuple[list[int], int]]:
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
    places = first_places.tolist()
    rows: list[int] = []
    stride = longest = shortest_room = 0
    for row in sorted(decoding, key=places.__getitem__):
        n_keys, own_room = past[row] + 1, int(room[row])
        if rows:
            distance = places[row] - places[rows[-1]]
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
