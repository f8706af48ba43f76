"""Texts and token ids of requests, as token rows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sae_runtime.model.tokenization import TokenizedText
from service.pb.saeserve.v1 import common_pb2
from service.rpc.checks import Violations
from service.rpc.limits import Limits

if TYPE_CHECKING:
    from sae_runtime import Backbone

# Tokenizing takes about 1 ms a kilobyte: longer texts would hold up the event loop.
_INLINE_BYTES = 2_048


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One input."""

    ids: tuple[int, ...]
    """Token ids that are run."""
    truncated: int
    """Number of tokens that were dropped."""
    tokenized: TokenizedText | None
    """Spans of all tokens of a text, dropped ones included; None for an input of token ids."""


class TextInputReader:
    """Reads inputs for one backbone."""

    def __init__(self, backbone: Backbone, limits: Limits) -> None:
        self._backbone = backbone
        self._limits = limits
        self._has_tokenizer = backbone.has_tokenizer
        self._pieces = [_piece(backbone, token) for token in range(backbone.vocab_size)] if self._has_tokenizer else []
        # One thread: long texts wait for each other and leave the cores to the model.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

    async def read(
        self,
        inputs: Sequence[common_pb2.TextInput],
        fields: Sequence[str],
        overflow: int,
        max_tokens: int,
        limit_name: str,
        drop: Literal["start", "end"],
        violations: Violations,
    ) -> list[TokenRow]:
        """The token rows of `inputs`, at most `max_tokens` each; `fields` are their names in the request.

        Tokens over the limit are dropped from one side with OVERFLOW_TRUNCATE and a violation otherwise. The rows can
        be used if there were no violations.
        """
        known = overflow in common_pb2.Overflow.values()
        if not known:
            violations.check_enum("overflow", overflow, common_pb2.Overflow.values())
        truncate = overflow == common_pb2.OVERFLOW_TRUNCATE
        total_bytes = sum(len(message.text) for message in inputs)
        rows = []
        for message, field in zip(inputs, fields, strict=True):
            kind = message.WhichOneof("input")
            if kind == "text":
                row = await self._read_text(
                    message.text, field, max_tokens, drop, total_bytes > _INLINE_BYTES, violations
                )
                field += ".text"
            elif kind == "token_ids":
                field += ".token_ids.ids"
                row = self._read_ids(message.token_ids.ids, field, max_tokens, drop, violations)
            else:
                violations.add(field, "is empty; set text or token_ids")
                continue
            if row is None:
                continue
            if row.truncated and not truncate and known:
                found = len(row.ids) + row.truncated
                violations.add(field, f"has {found} tokens, more than {limit_name} = {max_tokens}")
            rows.append(row)
        return rows

    async def _read_text(
        self, text: str, field: str, max_tokens: int, drop: str, in_thread: bool, violations: Violations
    ) -> TokenRow | None:
        field += ".text"
        # Characters are at most as many as bytes: a cheap test first, as the text may have any length.
        limit = self._limits.max_text_bytes
        if len(text) > limit or len(text.encode()) > limit:
            violations.add(field, f"has more bytes than max_text_bytes = {limit}")
            return None
        if not self._has_tokenizer:
            violations.add(field, "the backbone has no tokenizer; send token_ids")
            return None
        if in_thread:
            tokenized = await asyncio.get_running_loop().run_in_executor(self._thread, self._backbone.encode_text, text)
        else:
            tokenized = self._backbone.encode_text(text)
        if not len(tokenized):
            violations.add(field, "gives no tokens; at least one is needed")
            return None
        truncated = max(0, len(tokenized) - max_tokens)
        return TokenRow(tuple(_kept(tokenized.ids, max_tokens, drop)), truncated, tokenized)

    def _read_ids(
        self, ids: Sequence[int], field: str, max_tokens: int, drop: str, violations: Violations
    ) -> TokenRow | None:
        if not ids:
            violations.add(field, "is empty; at least one token is needed")
            return None
        kept = tuple(_kept(ids, max_tokens, drop))
        vocabulary = self._backbone.vocab_size
        if max(kept) >= vocabulary:
            at = next(place for place, token in enumerate(kept) if token >= vocabulary)
            place = at if drop == "end" else at + len(ids) - len(kept)
            violations.add(f"{field}[{place}]", f"token id {kept[at]} is outside the vocabulary of {vocabulary}")
        return TokenRow(kept, len(ids) - len(kept), None)

    def describe(self, row: TokenRow) -> tuple[TokenizedText, list[bytes]]:
        """Spans and bytes of the tokens that are run (of a row whose end may have been dropped).

        Token ids without a text stand for the bytes of their tokens.
        """
        pieces = [self._pieces[token] for token in row.ids]
        if row.tokenized is not None:
            n, whole = len(row.ids), row.tokenized
            return (
                TokenizedText(
                    whole.ids[:n],
                    whole.byte_starts[:n],
                    whole.byte_ends[:n],
                    whole.char_starts[:n],
                    whole.char_ends[:n],
                ),
                pieces,
            )
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = ends - [len(piece) for piece in pieces]
        # Bytes 10xxxxxx continue a character, all others begin one; the ids may start inside a character.
        begun = np.zeros(int(ends[-1]) + 1, np.int64)
        np.cumsum((np.frombuffer(b"".join(pieces), np.uint8) & 0xC0) != 0x80, out=begun[1:])
        first_char = np.maximum(begun[np.minimum(starts + 1, ends[-1])] - 1, 0)
        return TokenizedText(list(row.ids), starts, ends, first_char, np.maximum(begun[ends], first_char)), pieces

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none without a tokenizer."""
        return self._pieces[token] if self._has_tokenizer else b""

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of tokens; none without a tokenizer."""
        return [self._pieces[token] for token in ids] if self._has_tokenizer else []

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts can be read and tokens described."""
        return self._has_tokenizer

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _piece(backbone: Backbone, token: int) -> bytes:
    try:
        return backbone.token_bytes(token)
    except ValueError:  # vocabularies of models are padded beyond their tokenizer's
        return b""


def _kept(ids: Sequence[int], count: int, drop: str) -> Sequence[int]:
    if len(ids) <= count:
        return ids
    return ids[:count] if drop == "end" else ids[-count:]
