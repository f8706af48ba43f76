"""Causal self-attention over packed rows, with or without a cache.

Rows of one forward are sorted into groups once (`AttentionPlan.of`). Every layer then runs one attention call a group.

- Rows without a past, of similar length, are right-padded and use plain causal attention. They need no mask: a real
  token never looks at the padding behind its row.
- Rows with a past that bring one token (decoding) share a call, with a mask, if they start at equal distances in the
  cache. Any two rows do; so do all rows with equal reservations.
- A row with a past that brings several tokens (a prompt in pieces) has a call of its own, with a mask.

A group's queries are gathered from the packed tokens into a padded layout, and its outputs are put back. For two
prompts of 4 and 3 tokens, and a row between them that decodes:

    packed token      0 1 2 3 | 4 | 5 6 7
    row               0 0 0 0 | 1 | 2 2 2

    group             rows 0 and 2, T = 4     row 1, T = 1
    padded index      0 1 2 3 | 4 5 6 7       8
    gather            0 1 2 3 | 5 6 7 7       4               the packed token at each padded index

    restore           0 1 2 3 | 8 | 4 5 6                     the padded index of each packed token

One padded batch would do up to twice the work. One call per row would do hardly less work than the groups, but every
call waits for all threads, which is slow where cores are shared.
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

# A row joins a group whose longest row has T tokens if it has at least this share of T ...
_SIMILAR_LENGTH = 0.75
# ... or if T is at most this: attention over so few tokens costs less than another call.
_SHORT = 32
# A decoding call computes up to this many idle rows between two others, rather than being split in two.
_IDLE_ROWS = 2


@dataclass(frozen=True)
class _Group:
    """G rows padded to T tokens that share an attention call: padded indices [start, start + G * T)."""

    start: int
    n_rows: int
    length: int
    first_cell: int = 0
    stride: int = 0
    n_keys: int = 0
    """S: row g looks at the S cache cells from first_cell + g * stride on. 0: at the keys of the group's own tokens."""
    mask: Tensor | None = None
    """[G, 1, T, S], added to the scores of keys from the cache; None where every row's one token looks at all S."""


@dataclass(frozen=True)
class AttentionPlan:
    """How the rows of one forward attend; the same for every layer."""

    groups: tuple[_Group, ...]
    gather: Tensor | None
    """int64 [P]: the packed token at each padded index; None if the layouts are the same."""
    restore: Tensor | None
    """int64 [N]: the padded index of each packed token; None if the layouts are the same."""
    cells: Tensor | None
    """int64 [N]: the cache cell of each token; None without a cache."""

    @classmethod
    def of(cls, packed: PackedTokens, dtype: torch.dtype, cache: KVCache | None) -> AttentionPlan:
        """Plans for rows on `packed`'s device and prepares their slots in the cache.

        `dtype` is that of queries, keys and values.

        Raises:
            ValueError: the rows do not fit the cache (see KVCache.admit).
        """
        device = packed.ids.device
        builder = _GroupBuilder(packed, dtype)
        for rows in _fresh_rows(packed):
            builder.add_fresh(rows)
        cells = None
        if cache is not None:
            first_cells, n_readable = cache.admit(packed)
            for rows, stride in _cached_rows(packed, first_cells, n_readable):
                if packed.lengths[rows[0]] == 1:
                    builder.add_decoding(rows, first_cells, stride)
                else:
                    builder.add_continued(rows[0], first_cells[rows[0]])
            # Token t of a row goes into cell first_cell + past + t.
            if packed.one_token_each:
                next_cells = [first + past for first, past in zip(first_cells, packed.past, strict=True)]
                cells = torch.tensor(next_cells, device=device)
            else:
                shift = np.repeat(np.array(first_cells) + packed.past - builder.row_starts, packed.lengths)
                cells = torch.from_numpy(np.arange(len(packed)) + shift).to(device)
        groups = tuple(builder.groups)
        if builder.is_packing:
            return cls(groups, None, None, cells)
        return cls(groups, torch.tensor(builder.gather, device=device), builder.restore().to(device), cells)

    def attend(self, qkv: Tensor, n_heads: int, scale: float, layer: int, cache: KVCache | None) -> Tensor:
        """Causal attention of every row over itself and its cached past.

        Args:
            qkv: queries, keys and values side by side, [N, 3 * d_model], packed.
            scale: factor of the scores.
            layer: the layer of `cache` whose keys and values are read and written.

        Returns:
            [N, d_model], heads side by side, packed.
        """
        d_model = qkv.shape[1] // 3
        head_dim = d_model // n_heads
        if cache is not None:
            assert self.cells is not None
            cache.write(layer, self.cells, qkv.view(-1, 3 * n_heads, head_dim)[:, n_heads:])
        padded = qkv if self.gather is None else qkv.index_select(0, self.gather)  # [P, 3 * d_model]
        outputs = []
        for group in self.groups:
            g, t = group.n_rows, group.length
            rows = padded[group.start : group.start + g * t].view(g, t, 3, n_heads, head_dim)
            q, k, v = rows.permute(2, 0, 3, 1, 4)  # [G, n_heads, T, head_dim] each
            if not group.n_keys:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            else:
                assert cache is not None
                # The keys of the group's own tokens are among those in the cache: they were written above.
                k, v = cache.read(layer, group.first_cell, group.stride, g, group.n_keys)
                # [G, n_heads, S, head_dim] each
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)
            outputs.append(out.transpose(1, 2).reshape(g * t, d_model))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined if self.restore is None else joined.index_select(0, self.restore)


class _GroupBuilder:
    """Collects the groups of a forward and the packed token at each padded index.

    Decoding rows are handled in lists: NumPy takes several times longer for so few numbers, once a token.
    """

    def __init__(self, packed: PackedTokens, dtype: torch.dtype) -> None:
        self._packed, self._dtype = packed, dtype
        self.groups: list[_Group] = []
        self.gather: list[int] = []
        """The packed token at each padded index so far."""
        self._tokens: list[Sequence[int] | Indices] = []  # packed tokens of each group
        self._indices: list[Sequence[int] | Indices] = []  # where they stand, counted from the group's start

    @cached_property
    def row_starts(self) -> Indices:
        """[B] each row's first packed token."""
        lengths = np.array(self._packed.lengths)
        starts: Indices = lengths.cumsum() - lengths
        return starts

    @property
    def is_packing(self) -> bool:
        """Whether the padded layout is the packed one, so that nothing needs to be gathered."""
        return self.gather == list(range(len(self._packed)))

    def restore(self) -> Tensor:
        """int64 [N]: the padded index of each packed token."""
        restore = np.empty(len(self._packed), np.int64)
        for group, tokens, indices in zip(self.groups, self._tokens, self._indices, strict=True):
            restore[tokens] = group.start + np.asarray(indices)
        return torch.from_numpy(restore)

    def add_fresh(self, rows: list[int]) -> None:
        """Adds a group of rows without a past, the longest first."""
        lengths = np.array([self._packed.lengths[row] for row in rows])[:, None]
        token = np.arange(lengths[0, 0])  # [T]
        # Padding repeats the last token of its row, so that a NaN in one row stays in that row.
        tokens = self.row_starts[rows, None] + np.minimum(token, lengths - 1)  # [G, T]
        real = token < lengths
        self._add(_Group(self._end, len(rows), len(token)), tokens.ravel().tolist(), tokens[real], np.flatnonzero(real))

    def add_continued(self, row: int, first_cell: int) -> None:
        """Adds a row with a past that brings several tokens; its first token is in `first_cell` of the cache."""
        past, token = self._packed.past[row], np.arange(self._packed.lengths[row])
        n_keys = past + len(token)
        mask = self._mask(np.arange(n_keys) > (past + token)[:, None])[None, None]  # [1, 1, T, S]
        tokens = int(self.row_starts[row]) + token
        group = _Group(self._end, 1, len(token), first_cell, 0, n_keys, mask)
        self._add(group, tokens.tolist(), tokens, token)

    def add_decoding(self, rows: list[int], first_cells: Sequence[int], stride: int) -> None:
        """Adds a group of rows that bring one token each.

        `first_cells` are those of all rows. The group's begin at multiples of `stride`, and where a multiple belongs to
        no row of the group, the call computes an idle row that nobody reads. Rows a and c, with S = 7 keys:

            cache cells     | a a a a a . . . | b b b . . . . . | c c c c c c c . |
            row starts        first_cell        + stride          + 2 * stride
            keys read         ^ ^ ^ ^ ^ ^ ^     ^ ^ ^ ^ ^ ^ ^     ^ ^ ^ ^ ^ ^ ^
            mask              5 open, 2 hidden  7 open (idle)     7 open
        """
        first = first_cells[rows[0]]
        indices = [(first_cells[row] - first) // stride for row in rows] if stride else [0]
        past = [self._packed.past[row] for row in rows]
        n_rows, n_keys, mask = indices[-1] + 1, max(past) + 1, None
        if min(past) + 1 < n_keys:
            last_key = np.full((n_rows, 1), n_keys)  # idle rows hide no key; nobody reads their result
            last_key[indices, 0] = past
            mask = self._mask(np.arange(n_keys) > last_key)[:, None, None]  # [G, 1, 1, S]
        tokens = rows if self._packed.one_token_each else self.row_starts[rows].tolist()
        gather = [0] * n_rows  # idle rows repeat packed token 0
        for index, token in zip(indices, tokens, strict=True):
            gather[index] = token
        group = _Group(self._end, n_rows, 1, first, stride, n_keys, mask)
        self._add(group, gather, tokens, indices)

    @property
    def _end(self) -> int:
        """The next padded index."""
        return len(self.gather)

    def _add(
        self, group: _Group, gather: list[int], tokens: Sequence[int] | Indices, indices: Sequence[int] | Indices
    ) -> None:
        """`gather`: the packed token at each of the group's G * T indices; `indices`: those of its real `tokens`."""
        self.groups.append(group)
        self.gather += gather
        self._tokens.append(tokens)
        self._indices.append(indices)

    def _mask(self, hidden: npt.NDArray[np.bool_]) -> Tensor:
        scores = np.where(hidden, np.float32("-inf"), np.float32(0))
        return torch.from_numpy(scores).to(self._packed.ids.device, self._dtype)


def _fresh_rows(packed: PackedTokens) -> list[list[int]]:
    """Rows without a past in groups of similar length, by falling length."""
    groups: list[list[int]] = []
    lengths, past = packed.lengths, packed.past
    for row in sorted((r for r, p in enumerate(past) if p == 0), key=lambda r: -lengths[r]):
        longest = lengths[groups[-1][0]] if groups else 0
        if longest and (longest <= _SHORT or lengths[row] >= _SIMILAR_LENGTH * longest):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _cached_rows(
    packed: PackedTokens, first_cells: Sequence[int], n_readable: Sequence[int]
) -> list[tuple[list[int], int]]:
    """Rows with a past in groups, each with its stride: the distance of its rows in the cache (0 for one row).

    A group's rows are in the order of their cells and start at multiples of its stride. All of them look at as many
    keys as the longest has. That count never exceeds any row's `n_readable`, so no row looks at another row's keys, and
    a NaN in one row stays in that row.
    """
    lengths, past = packed.lengths, packed.past
    groups: list[tuple[list[int], int]] = []
    decoding: list[int] = []
    for row, n in enumerate(past):
        if n and lengths[row] == 1:
            decoding.append(row)
        elif n:
            groups.append(([row], 0))
    rows: list[int] = []  # of the open group
    stride = most_keys = fewest_readable = 0
    for row in sorted(decoding, key=first_cells.__getitem__):
        n_keys = past[row] + 1
        if rows:
            distance = first_cells[row] - first_cells[rows[-1]]
            # The second row sets the stride; later ones may leave out up to _IDLE_ROWS multiples of it.
            even = not stride or (distance % stride == 0 and distance <= (1 + _IDLE_ROWS) * stride)
            if even and max(most_keys, n_keys) <= min(fewest_readable, n_readable[row]):
                rows.append(row)
                stride = stride or distance
                most_keys, fewest_readable = max(most_keys, n_keys), min(fewest_readable, n_readable[row])
                continue
            groups.append((rows, stride))
        rows, stride, most_keys, fewest_readable = [row], 0, n_keys, n_readable[row]
    if rows:
        groups.append((rows, stride))
    return groups
