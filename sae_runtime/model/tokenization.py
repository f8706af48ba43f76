"""Text to token ids with exact spans, for byte-level BPE tokenizers (GPT-2's and the builtin one)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """n tokens of one text. Token i is the text's UTF-8 bytes [byte_starts[i], byte_ends[i]).

    A token may hold only part of a character: its character span then covers the whole character, so neighbouring
    character spans may overlap, while byte spans always follow one another without gaps.
    """

    ids: list[int]
    """n token ids."""
    byte_starts: npt.NDArray[np.int64]
    """[n] offsets into the text's UTF-8 bytes."""
    byte_ends: npt.NDArray[np.int64]
    char_starts: npt.NDArray[np.int64]
    """[n] offsets into the text's characters (Unicode code points)."""
    char_ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


class TextTokenizer:
    """A byte-level BPE tokenizer whose tokens' bytes, one after the other, are the UTF-8 bytes of the text."""

    def __init__(self, backend: Tokenizer) -> None:
        """Takes over `backend`, and switches off its truncation, padding and BPE dropout; nothing else may use it.

        Raises:
            ValueError: a token is not spelt in the byte-level alphabet, or a normaliser or pre-tokenizer changes
                ordinary text.
        """
        backend.no_truncation()
        backend.no_padding()
        switch_off_dropout(backend)
        self._backend = backend
        self._bytes = _bytes_of_tokens(backend)
        self._byte_lengths = np.array([len(token) for token in self._bytes], dtype=np.int64)
        spelt = {token for token in self._bytes if len(token) == 1}
        probe = "".join(char for char in _PROBE if all(bytes([byte]) in spelt for byte in char.encode()))
        self.encode(probe)

    @classmethod
    def copy_of(cls, backend: Tokenizer) -> TextTokenizer:
        """A tokenizer on a copy of `backend`: every call of transformers' tokenizer changes truncation and padding."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(backend.to_str()))

    @classmethod
    def from_file(cls, path: Path) -> TextTokenizer:
        """Reads a tokenizer.json. ValueError, naming the file: not a tokenizer, or one that `TextTokenizer` refuses."""
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exceptions
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        try:
            return cls(backend)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of vocabulary and merges as canonical JSON; it does not depend on the files they were read from."""
        merges = json.loads(self._backend.to_str())["model"]["merges"]
        canonical = {
            "merges": [merge.split(" ") if isinstance(merge, str) else merge for merge in merges],
            "vocab": self._backend.get_vocab(with_added_tokens=True),
        }
        return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def n_ids(self) -> int:
        """One more than the largest token id."""
        return len(self._bytes)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for.

        Raises:
            ValueError: there is no token of that id.
        """
        if not 0 <= token_id < len(self._bytes):
            raise ValueError(f"token id {token_id} is outside the tokenizer's vocabulary of {len(self._bytes)}")
        return self._bytes[token_id]

    def encode(self, text: str) -> TokenizedText:
        """Tokenizes without adding special tokens. A special token spelt out in the text becomes that token.

        Raises:
            ValueError: the text has no UTF-8 form (lone surrogates), or its tokens stand for other bytes (a normaliser
                changes this text, or the vocabulary lacks one of its bytes).
        """
        encoded = text.encode()  # UnicodeEncodeError is a ValueError and names the place
        # A batch of one: unlike `encode`, `encode_batch` lets other threads run meanwhile.
        ids = self._backend.encode_batch([text], add_special_tokens=False)[0].ids
        if b"".join([self._bytes[token] for token in ids]) != encoded:
            raise ValueError(
                f"the tokenizer changes the text: its tokens stand for other bytes than {_shown(text)}. "
                "Only byte-level tokenizers that keep a text as it is are supported"
            )
        ends = self._byte_lengths[ids].cumsum() if ids else np.zeros(0, np.int64)
        starts = ends - self._byte_lengths[ids] if ids else ends
        if text.isascii() or not ids:
            return TokenizedText(ids, starts, ends, starts, ends)
        # Bytes of the form 10xxxxxx continue a character, all others begin one.
        begins = (np.frombuffer(encoded, np.uint8) & 0xC0) != 0x80
        char_of_byte = begins.cumsum() - 1
        return TokenizedText(ids, starts, ends, char_of_byte[starts], char_of_byte[ends - 1] + 1)

    def decode(self, ids: list[int]) -> str:
        """The text of the tokens; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")


_PROBE = "HELLO World  é ﬁ\u00a0日本 🙂 \n"
"""Text that normalisers change: cases, accents, ligatures, several spaces, and spaces at an end.

It is in Unicode's form C: tokenizers that bring texts into that form (Qwen's) leave nearly all texts as they are.
"""


def switch_off_dropout(backend: Tokenizer) -> None:
    """BPE dropout skips merges at random, in training; in use, a text must have the same tokens at every call."""
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _bytes_of_tokens(backend: Tokenizer) -> list[bytes]:
    """The bytes of every token id; empty where an id has no token."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        try:
            # Added tokens stand for themselves; the others are spelt with one character for each byte.
            table[token_id] = token.encode() if token in added else bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError as error:
            raise ValueError(f"the tokenizer is not byte-level: token {token_id} is spelt {token!r}") from error
    return table


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the others are U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(unprintable)}


_BYTE_OF = _byte_alphabet()
