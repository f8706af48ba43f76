"""The arithmetic of edits at one site of a packed batch, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.dictionary.finite import all_finite
from sae_runtime.edits.latent_reader import LatentReader
from sae_runtime.edits.layout import DictionaryLayout, Indices, SiteLayout


class EditOutOfRange(ValueError):
    """Edited values overflow, or change more than is allowed; `rows` are the rows of the packed batch at fault."""

    def __init__(self, message: str, rows: tuple[int, ...]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True, eq=False)
class _DictionaryEdits:
    """What one dictionary reads and changes at a site: see DictionaryLayout, whose arrays are here tensors."""

    dictionary: Dictionary
    tokens: Tensor | None  # int64 [T]; None: all of the site's
    features: Tensor  # int64 [F]
    wanted: Tensor  # bool [T, F], latents that anything reads
    pairs: Tensor  # int64 [P]
    arithmetic: Tensor  # [4, P]
    gates: Tensor | None  # int64 [P]
    terms: Tensor  # int64 [L]
    thresholds: Tensor  # [L]
    signs: Tensor  # [L]
    replaced: Tensor  # int64 [R]
    replaced_gates: Tensor | None  # int64 [R]

    @cached_property
    def decoder(self) -> Tensor:
        """Decoder rows of the latents, [F, width], in the dtype of the arithmetic."""
        return self.dictionary.decoder[self.features].to(self.arithmetic.dtype)

    @cached_property
    def reader(self) -> LatentReader:
        return LatentReader(self.dictionary, self.features, self.wanted)

    @cached_property
    def is_clamped(self) -> bool:
        return bool(self.arithmetic[2:].isfinite().any())

    @property
    def changes(self) -> bool:
        return self.pairs.numel() > 0 or self.replaced.numel() > 0

    def read(self, h: Tensor) -> _Reading:
        """Encodes the site's tokens h [N_s, width]."""
        x = h if self.tokens is None else h[self.tokens]
        reconstruction = None
        if self.replaced.numel():
            encoded = self.dictionary.encode(x)
            z, statistics = encoded.select_ascending(self.features), encoded.input_statistics
            reconstruction = self.dictionary.decode(encoded[self.replaced])
        else:
            z, statistics = self.reader.read(x)
        z = z.to(self.arithmetic.dtype)
        return _Reading(x, z, None if statistics is None else statistics.std, reconstruction)

    def truth(self, reading: _Reading) -> Tensor:
        """Whether each of the thresholds is passed: 1 or 0, [L]."""
        values = reading.z.view(-1)[self.terms] * self.signs
        # "At most" is the opposite of "above", so it holds where they are equal.
        return torch.where(self.signs > 0, values > self.thresholds, values >= self.thresholds).to(values.dtype)

    def delta(self, reading: _Reading, truth: Tensor) -> Tensor:
        """What to add to the dictionary's tokens, [T, width]; truth holds every slot."""
        z = reading.z
        old = z.view(-1)[self.pairs]
        scale, shift, minimum, maximum = self.arithmetic
        new = torch.addcmul(shift, scale, old)
        if self.is_clamped:
            new = torch.clamp(new, minimum, maximum)
        change = new - old
        if self.gates is not None:
            change = change * truth[self.gates]
        changes = torch.zeros_like(z).view(-1).index_copy_(0, self.pairs, change).view(z.shape)
        delta = changes @ self.decoder
        if reading.std is not None:
            delta = delta * reading.std
        if reading.reconstruction is not None:
            lost = reading.reconstruction.to(delta.dtype) - reading.x[self.replaced].to(delta.dtype)
            if self.replaced_gates is not None:
                lost = lost * truth[self.replaced_gates, None]
            delta = delta.index_add_(0, self.replaced, lost)
        return delta


@dataclass(frozen=True, eq=False)
class _Reading:
    """A dictionary's tokens before any edit at their site."""

    x: Tensor  # [T, width]
    z: Tensor  # [T, F]
    std: Tensor | None  # [T, 1], where the dictionary normalises
    reconstruction: Tensor | None  # [R, width] of the replaced tokens


@dataclass(frozen=True, eq=False)
class _Level:
    """See GateLevel."""

    inner: Tensor
    outer: Tensor
    need: Tensor


class SiteEdits:
    """The edits of one site; all of them read the activation as it was before any of them."""

    def __init__(self, layout: SiteLayout) -> None:
        device = layout.dictionaries[0].dictionary.device
        upload = _Upload()
        tokens = upload.ints(layout.tokens)
        parts = [_DictionaryUpload(each, len(layout.tokens), upload) for each in layout.dictionaries]
        levels = [
            (upload.ints(each.inner), upload.ints(each.outer), upload.floats(each.need)) for each in layout.levels
        ]
        limits = upload.floats(layout.limits) if bool(np.isfinite(layout.limits).any()) else None
        wide = any(each.dictionary.dtype == torch.float64 for each in layout.dictionaries)
        self._dtype = torch.float64 if wide else torch.float32
        upload.send(device, self._dtype)

        self.n_earlier = layout.n_earlier
        self._site = layout.site
        self._rows = layout.rows
        self._tokens = upload[tokens]
        self._limits = None if limits is None else upload[limits][:, None]
        self._one = upload[upload.one]
        self._levels = [_Level(upload[inner], upload[outer], upload[need]) for inner, outer, need in levels]
        self._dictionaries = [part.received(upload) for part in parts]
        self._changes = any(each.changes for each in self._dictionaries)

    def apply(self, x: Tensor, truths: list[Tensor]) -> Tensor:
        """The edited x [N, width]; adds the truth of the thresholds that are read here to those of earlier sites."""
        every = len(self._tokens) == len(x)
        h = x if every else x[self._tokens]  # [N_s, width]
        before = h.detach()
        readings = [each.read(before) for each in self._dictionaries]
        for each, reading in zip(self._dictionaries, readings, strict=True):
            if each.terms.numel():
                truths.append(each.truth(reading))
        if not self._changes:
            return x
        truth = self._combine(truths)
        dtype = torch.promote_types(x.dtype, self._dtype)
        added: Tensor | None = None
        for each, reading in zip(self._dictionaries, readings, strict=True):
            if not each.changes:
                continue
            delta = each.delta(reading, truth).to(dtype)
            if each.tokens is not None:
                delta = torch.zeros(h.shape, dtype=dtype, device=x.device).index_copy_(0, each.tokens, delta)
            added = delta if added is None else added + delta
        assert added is not None
        # Where nothing is added the token stays bitwise the same: a sum would lose the sign of -0.
        edited = torch.where(added == 0, h, (h.to(dtype) + added).to(x.dtype))
        self._check(before, added, edited.detach())
        return edited if every else x.index_copy(0, self._tokens, edited)

    def _combine(self, truths: Sequence[Tensor]) -> Tensor:
        """All truth values: the constant, the thresholds read so far, and the combinations of this site."""
        truth = torch.cat([self._one, *truths]) if truths else self._one
        for level in self._levels:
            count = torch.zeros_like(level.need).index_add_(0, level.outer, truth[level.inner])
            truth = torch.cat([truth, (count >= level.need).to(truth.dtype)])
        return truth

    def _check(self, before: Tensor, added: Tensor, edited: Tensor) -> None:
        if self._limits is None:
            if not all_finite(edited):
                self._refuse(edited.isfinite().all(dim=1), f"edits at {self._site} leave the range of {edited.dtype}")
            return
        size = torch.linalg.vector_norm(before.to(added.dtype), dim=1, keepdim=True)
        change = torch.linalg.vector_norm(added, dim=1, keepdim=True)
        fits = ((change <= self._limits * size) & edited.isfinite().all(dim=1, keepdim=True)).squeeze(1)
        if bool(fits.all()):
            return
        first = int((~fits).nonzero()[0])
        if not bool(edited[first].isfinite().all()):
            self._refuse(fits, f"edits at {self._site} leave the range of {edited.dtype}")
        ratio, limit = float(change[first] / size[first]), float(self._limits[first])
        self._refuse(
            fits,
            f"edits at {self._site} change an activation by {ratio:.4g} x its size, "
            f"more than max_relative_change = {limit:g}",
        )

    def _refuse(self, fits: Tensor, message: str) -> None:
        bad = np.unique(self._rows[(~fits).cpu().numpy()])
        raise EditOutOfRange(message, tuple(int(row) for row in bad))


class _Upload:
    """Sends all index arrays to the device at once, and all numbers: small transfers cost more than their bytes."""

    def __init__(self) -> None:
        self._ints: list[Indices] = []
        self._floats: list[NDArray[np.floating]] = []
        self.one = self.floats(np.ones(1))
        self._int_tensors: Sequence[Tensor] = ()
        self._float_tensors: Sequence[Tensor] = ()

    def ints(self, values: Indices) -> int:
        """What to ask for them by, after `send`."""
        self._ints.append(values)
        return len(self._ints) - 1

    def floats(self, values: NDArray[np.floating]) -> int:
        """The same for numbers; one axis."""
        self._floats.append(values)
        return -len(self._floats)

    def send(self, device: torch.device, dtype: torch.dtype) -> None:
        ints = torch.from_numpy(np.concatenate(self._ints)).to(device)
        floats = torch.from_numpy(np.concatenate([each.astype(np.float64) for each in self._floats]))
        floats = floats.to(dtype).to(device)
        self._int_tensors = ints.split([len(each) for each in self._ints])
        self._float_tensors = floats.split([len(each) for each in self._floats])

    def __getitem__(self, key: int) -> Tensor:
        return self._int_tensors[key] if key >= 0 else self._float_tensors[-key - 1]


class _DictionaryUpload:
    """One dictionary's arrays on their way to the device."""

    def __init__(self, layout: DictionaryLayout, n_site: int, upload: _Upload) -> None:
        self._layout = layout
        self._shape = (len(layout.tokens), len(layout.features))
        wanted = np.zeros(self._shape[0] * self._shape[1], np.int64)
        wanted[layout.pairs[depends_on_latent(layout.arithmetic)]] = 1
        wanted[layout.terms] = 1
        self._all = len(layout.tokens) == n_site
        ints = (layout.tokens, layout.features, wanted, layout.pairs, layout.terms, layout.replaced)
        self._ints = [upload.ints(each) for each in ints]
        self._floats = [upload.floats(each) for each in (layout.arithmetic.ravel(), layout.thresholds, layout.signs)]
        gates = (layout.gates, layout.replaced_gates)
        self._gates = [None if each is None else upload.ints(each) for each in gates]

    def received(self, upload: _Upload) -> _DictionaryEdits:
        """Once the upload was sent."""
        tokens, features, wanted, pairs, terms, replaced = (upload[each] for each in self._ints)
        arithmetic, thresholds, signs = (upload[each] for each in self._floats)
        gates, replaced_gates = (None if each is None else upload[each] for each in self._gates)
        return _DictionaryEdits(
            dictionary=self._layout.dictionary,
            tokens=None if self._all else tokens,
            features=features,
            wanted=wanted.view(self._shape).bool(),
            pairs=pairs,
            arithmetic=arithmetic.view(4, -1),
            gates=gates,
            terms=terms,
            thresholds=thresholds,
            signs=signs,
            replaced=replaced,
            replaced_gates=replaced_gates,
        )


def depends_on_latent(arithmetic: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Whether what an edit adds depends on the latent, of arithmetic [4, P]: not if it only adds a number."""
    scale, _, minimum, maximum = arithmetic
    depends: NDArray[np.bool_] = (scale != 1) | np.isfinite(minimum) | np.isfinite(maximum)
    return depends
