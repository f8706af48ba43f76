"""A vocabulary of few tokens, and examples of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sae_runtime.catalogue.examples import Examples
from sae_runtime.catalogue.vocabulary import Vocabulary

PIECES = [
    *(b"king", b" king", b"King", b" =", b"=", b"\n", b" ", b"12", b".", b"ing", b" The", b"NATO"),
    *(b"\xc3", b" \xc3\xa9t\xc3\xa9", b"a", b'"', b"", b" walking", b"talking", b"x1"),
]
VOCABULARY = Vocabulary(PIECES)


def token(piece: str | bytes) -> int:
    return PIECES.index(piece.encode() if isinstance(piece, str) else piece)


def examples(
    texts: Sequence[Sequence[str | bytes]],
    active: Sequence[bool] | None = None,
    *,
    window: int = 6,
    next_pieces: Sequence[str | None] | None = None,
    **columns: Any,
) -> Examples:
    """The last tokens of rows that hold nothing else; what is not given is 0."""
    n = len(texts)
    ids = np.full((n, window), -1)
    for i, text in enumerate(texts):
        last = [token(piece) for piece in text][-window:]
        ids[i, window - len(last) :] = last
    following = [-1 if piece is None else token(piece) for piece in next_pieces or [None] * n]
    given: dict[str, Any] = {
        "position": [len(text) - 1 for text in texts],
        "activation": active if active is not None else [0] * n,
        "hard": [False] * n,
        **{name: [0] * n for name in ("document", "kind", "language")},
        **columns,
    }
    dtypes = {"activation": np.float32, "hard": np.bool_}
    arrays: dict[str, Any] = {name: np.array(values, dtypes.get(name, np.int64)) for name, values in given.items()}
    return Examples(ids=ids, next_id=np.array(following), **arrays, kinds=("code", "maths"), languages=("de", "fr"))
