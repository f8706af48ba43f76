"""The arithmetic of plain edits on the CPU in a few compiled loops, as decoding does it once a token.

It is that of SiteEdits, which can do all edits on every device, for those that most streams have: edits of a float32
TopK dictionary, without conditions and replacements. There the latents are read with as little of the encoder as tells
whether they are kept (see topk_membership).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.dictionary.normalization import LAYER_NORM_EPS, NORMALIZATIONS
from sae_runtime.edits.apply import SiteEdits, depends_on_latent
from sae_runtime.edits.layout import SiteLayout
from sae_runtime.kernels.compiled import compiled
from sae_runtime.kernels.topk_membership import kept_in_topk

Floats = NDArray[Any]
Ints = NDArray[np.int64]


class HostEdits:
    """SiteEdits for layouts that `can_edit` accepts."""

    n_earlier = 0
    """Conditions of earlier sites that it reads."""

    def __init__(self, layout: SiteLayout) -> None:
        (own,) = layout.dictionaries
        dictionary = own.dictionary
        self._layout, self._dictionary = layout, dictionary
        self._tokens = layout.tokens
        order = np.argsort(own.pairs)  # by token
        self._row, self._column = np.divmod(own.pairs[order], len(own.features))
        self._arithmetic = own.arithmetic[:, order].astype(np.float32)
        self._read = np.flatnonzero(depends_on_latent(self._arithmetic))  # the pairs whose latent counts
        self._latents = own.features[self._column]  # of each pair
        features = torch.from_numpy(own.features)
        self._encoder, self._decoder = dictionary.encoder[features].numpy(), dictionary.decoder[features].numpy()
        self._latent_bias = dictionary.latent_bias[features].numpy()
        self._pre_bias = dictionary.pre_bias.numpy()
        self._normalization = NORMALIZATIONS.index(dictionary.normalization)
        self._limits = layout.limits.astype(np.float32)

    @staticmethod
    def can_edit(layout: SiteLayout) -> bool:
        """Whether nothing but the pairs of one float32 TopK dictionary on the CPU is edited."""
        if len(layout.dictionaries) != 1:
            return False
        (own,) = layout.dictionaries
        dictionary = own.dictionary
        return (
            (dictionary.activation, dictionary.postact, dictionary.dtype) == ("topk", "relu", torch.float32)
            and dictionary.device.type == "cpu"
            and own.gates is None
            and not len(own.replaced)
            and not len(own.terms)
        )

    @cached_property
    def _by_torch(self) -> SiteEdits:
        return SiteEdits(self._layout)

    def apply(self, x: Tensor, truths: list[Tensor]) -> Tensor:
        """As SiteEdits."""
        dictionary = self._dictionary
        fits = x.shape[1:] == (dictionary.d_in,) and len(x) > self._tokens[-1]  # compiled loops check no bounds
        if x.requires_grad or x.dtype != torch.float32 or x.device != dictionary.device or not fits:
            return self._by_torch.apply(x, truths)
        h = x.contiguous().numpy()
        n, d = len(self._tokens), h.shape[1]
        active = np.empty(len(self._read), np.int64)
        prepared = np.empty((len(active), d), np.float32)
        scale, old = np.empty(n, np.float32), np.zeros(len(self._row), np.float32)
        n_active = _read(
            h,
            self._tokens,
            self._normalization,
            self._pre_bias,
            self._read,
            self._row,
            self._column,
            self._encoder,
            self._latent_bias,
            scale,
            old,
            active,
            prepared,
        )
        if n_active > 0:
            assert dictionary.k is not None
            pairs = active[:n_active]
            old[pairs] *= kept_in_topk(
                torch.from_numpy(prepared[:n_active]),
                dictionary.linear_encoder,
                dictionary.k,
                self._latents[pairs],
                old[pairs],
                dictionary.in_bytes,
            )
        if n_active >= 0:
            edited = np.empty_like(h) if n == len(h) else h.copy()
            arithmetic, decoder = self._arithmetic, self._decoder
            if _add(h, self._tokens, self._row, self._column, old, arithmetic, decoder, scale, self._limits, edited):
                return torch.from_numpy(edited)
        return self._by_torch.apply(x, truths)  # which says what is wrong


@compiled
def _read(
    h: Floats,
    tokens: Ints,
    normalization: int,
    pre_bias: Floats,
    read: Ints,
    row: Ints,
    column: Ints,
    encoder: Floats,
    latent_bias: Floats,
    scale: Floats,
    old: Floats,
    active: Ints,
    prepared: Floats,
) -> int:
    """Pre-activations of the pairs to `read`, ascending, on the tokens h[tokens]: how many are positive, or -1 if
    anything is not finite.

    Writes what restores each token's `scale`, and for the positive ones `old`, their places among the pairs to `active`
    and their tokens, as `Dictionary.prepare` makes them, to the first rows of `prepared`.
    """
    d = h.shape[1]
    n_active = 0
    done = 0
    own = np.empty(d, np.float32)
    for i in range(len(tokens)):
        t = tokens[i]
        mean = np.float32(0)
        if normalization == 1:  # layer_norm
            for j in range(d):
                mean += h[t, j]
            mean /= np.float32(d)
        squares = np.float32(0)
        for j in range(d):
            own[j] = h[t, j] - mean
            squares += own[j] * own[j]
        if not np.isfinite(squares):
            return -1
        scale[i] = np.float32(1)
        factor = np.float32(1)
        if normalization == 1:
            scale[i] = np.sqrt(squares) / np.sqrt(np.float32(d - 1))
            factor = np.float32(1) / (scale[i] + np.float32(LAYER_NORM_EPS))
        elif normalization == 2:  # constant_norm
            scale[i] = np.sqrt(squares) / np.sqrt(np.float32(d))
            factor = np.float32(1) / scale[i] if scale[i] > 0 else np.float32(0)
        for j in range(d):
            own[j] = own[j] * factor - pre_bias[j]
        while done < len(read) and row[read[done]] == i:
            pair = read[done]
            done += 1
            value = np.float32(0)
            for j in range(d):
                value += own[j] * encoder[column[pair], j]
            value += latent_bias[column[pair]]
            if not np.isfinite(value):
                return -1
            if value > 0:
                old[pair] = value
                active[n_active] = pair
                for j in range(d):
                    prepared[n_active, j] = own[j]
                n_active += 1
    return n_active


@compiled
def _add(
    h: Floats,
    tokens: Ints,
    row: Ints,
    column: Ints,
    old: Floats,
    arithmetic: Floats,
    decoder: Floats,
    scale: Floats,
    limits: Floats,
    edited: Floats,
) -> bool:
    """Writes the edited tokens; whether all of them are finite, and changed no more than allowed."""
    d = h.shape[1]
    added = np.zeros((len(tokens), d), np.float32)
    for pair in range(len(row)):
        new = arithmetic[0, pair] * old[pair] + arithmetic[1, pair]
        new = min(max(new, arithmetic[2, pair]), arithmetic[3, pair])
        change = new - old[pair]
        for j in range(d):
            added[row[pair], j] += change * decoder[column[pair], j]
    for i in range(len(tokens)):
        t = tokens[i]
        size = np.float32(0)
        change = np.float32(0)
        total = np.float32(0)
        for j in range(d):
            before = h[t, j]
            more = added[i, j] * scale[i]
            # Where nothing is added it stays bitwise the same: a sum would lose the sign of -0.
            after = before if more == 0 else before + more
            edited[t, j] = after
            size += before * before
            change += more * more
            total += abs(after)
        if not (np.isfinite(total) and np.sqrt(change) <= limits[i] * np.sqrt(size)):
            return False
    return True
