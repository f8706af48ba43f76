"""Tokens on which a latent fires, and tokens on which it does not: what labels are made from and tested on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Examples:
    """n tokens with the text before them.

    The ids of a token and of those before it are right-aligned, so that column -1 - b is b tokens back:

        ids    -1  -1   5  12   7     the third token of a row, 7, with a window of 5
        back    4   3   2   1   0
    """

    ids: Integers
    """[n, window]; -1 where nothing is: before the beginning of the row or of the document."""
    next_id: Integers
    """[n], the token after; -1 where there is none."""
    position: Integers
    """[n], position in the row, from 0."""
    document: Integers
    """[n], any number that tells documents apart."""
    kind: Integers
    """[n], index into `kinds`."""
    language: Integers
    """[n], index into `languages`; -1 where the text does not say it."""
    activation: npt.NDArray[np.float32]
    """[n], of the latent; 0 where it is silent."""
    hard: Mask
    """[n], silent tokens that were chosen because latents near this one fire on them."""
    kinds: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name, array in self._columns():
            if len(array) != n:
                raise ValueError(f"{n} examples, but {len(array)} of `{name}`")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: slice | Integers | Mask) -> Examples:
        columns: dict[str, Any] = {name: array[index] for name, array in self._columns()}
        return Examples(**columns, kinds=self.kinds, languages=self.languages)

    @property
    def active(self) -> Mask:
        """[n], where the latent fires."""
        return self.activation > 0

    def token(self, back: int = 0) -> Integers:
        """[n], the ids that many tokens back; -1 where nothing is."""
        if back >= self.ids.shape[1]:
            return np.full(len(self), -1)
        return self.ids[:, -1 - back]

    def _columns(self) -> list[tuple[str, npt.NDArray[np.generic]]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.name not in ("kinds", "languages")]


@dataclass(frozen=True, eq=False)
class LatentExamples:
    """Examples of one latent from two halves of the documents: labels are chosen on one, and tested on the other."""

    fit: Examples
    held_out: Examples
