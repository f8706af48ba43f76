"""A reversed trie of n-grams with wildcards: the form of an N2G explanation (Foote et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Pattern = tuple[int | None, ...]
"""Token ids in the order of the text, None for any token; the last one is where the latent fires."""


@dataclass
class _Node:
    children: dict[int | None, _Node] = field(default_factory=dict)
    ends: bool = False


class NgramTrie:
    """Predicts that a latent fires on a token when the tokens up to it match one of the patterns."""

    def __init__(self) -> None:
        self._root = _Node()

    def insert(self, pattern: Pattern) -> None:
        """Adds a pattern of at least one token."""
        node = self._root
        for token in reversed(pattern):
            node = node.children.setdefault(token, _Node())
        node.ends = True

    def matches(self, ids: npt.NDArray[np.int64], row_start: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each token of packed rows ends a match within its row.

        Args:
            ids: [N] tokens.
            row_start: [N], where each token's row begins.
        """
        ends_match = np.zeros(len(ids), bool)
        # (node, tokens that match so far, how many tokens back the next one is)
        open_: list[tuple[_Node, npt.NDArray[np.int64], int]] = [(self._root, np.arange(len(ids)), 0)]
        while open_:
            node, tokens, back = open_.pop()
            if node.ends:
                ends_match[tokens] = True
            inside = tokens[tokens - back >= row_start[tokens]]
            if len(inside) == 0:
                continue
            before = ids[inside - back]
            for token, child in node.children.items():
                matching = inside if token is None else inside[before == token]
                if len(matching):
                    open_.append((child, matching, back + 1))
        return ends_match
