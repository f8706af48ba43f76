"""Texts and token ids of requests, as token rows; and tokens for replies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sae_runtime.model.tokenization import TokenizedText
from service.arrays import pack_tokens
from service.pb.saeserve.v1 import causal_pb2, common_pb2
from service.rpc.checks import Violations
from service.rpc.errors import shown
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


@dataclass(frozen=True)
class _Reading:
    """How one input is read."""

    field: str
    overflow: int
    max_tokens: int
    limit_name: str
    """What bounds the tokens, for a violation."""
    drop: Literal["start", "end"]
    """Where tokens over the limit are dropped, with OVERFLOW_TRUNCATE; they are a violation otherwise."""
    in_thread: bool

    def kept(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(ids[: self.max_tokens] if self.drop == "end" else ids[-self.max_tokens :])


class TextInputReader:
    """Reads inputs for one backbone."""

    def __init__(self, backbone: Backbone, limits: Limits) -> None:
        self._backbone = backbone
        self._limits = limits
        self._has_tokenizer = backbone.has_tokenizer
        self._pieces = [_piece(backbone, token) for token in range(backbone.vocab_size)] if self._has_tokenizer else []
        # One thread: long texts wait for each other and leave the cores to the model.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts can be read and tokens described."""
        return self._has_tokenizer

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # Inputs

    async def read_inputs(
        self, inputs: Sequence[common_pb2.TextInput], overflow: int, violations: Violations, *, least: int = 1
    ) -> list[TokenRow]:
        """The field `inputs` of a call: rows of at least `least` tokens, within the limits of one call."""
        if not violations.check_count("inputs", len(inputs), "max_inputs"):
            return []
        rows = await self.read_list(inputs, "inputs", overflow, violations, least=least)
        tokens = sum(len(row.ids) for row in rows)
        violations.check_limit("inputs", tokens, "max_tokens_per_request", "have {} tokens together")
        return rows

    async def read_list(
        self,
        inputs: Sequence[common_pb2.TextInput],
        field: str,
        overflow: int,
        violations: Violations,
        *,
        least: int = 1,
    ) -> list[TokenRow]:
        """The rows of a repeated field, at least `least` tokens and at most max_tokens_per_input each.

        They can be used if there were no violations.
        """
        self._check_overflow(overflow, violations)
        total_bytes = sum(len(message.text) for message in inputs)
        rows = []
        for place, message in enumerate(inputs):
            where, most = f"{field}[{place}]", self._limits.max_tokens_per_input
            read = _Reading(where, overflow, most, "max_tokens_per_input", "end", total_bytes > _INLINE_BYTES)
            row = await self._read(message, read, violations)
            if row is not None:
                rows.append(row)
                if len(row.ids) < least:
                    violations.add(where, f"has {len(row.ids)} token, expected at least {least}")
        return rows

    async def read_one(
        self,
        message: common_pb2.TextInput | None,
        field: str,
        overflow: int,
        max_tokens: int,
        limit_name: str,
        drop: Literal["start", "end"],
        violations: Violations,
    ) -> TokenRow | None:
        """The row of a single field, at most `max_tokens` long; None, with a violation, if there is none."""
        self._check_overflow(overflow, violations)
        if message is None:
            violations.add(field, "is not set")
            return None
        read = _Reading(field, overflow, max_tokens, limit_name, drop, len(message.text) > _INLINE_BYTES)
        return await self._read(message, read, violations)

    @staticmethod
    def _check_overflow(overflow: int, violations: Violations) -> None:
        violations.check_enum("overflow", overflow, common_pb2.Overflow.values())

    async def _read(self, message: common_pb2.TextInput, read: _Reading, violations: Violations) -> TokenRow | None:
        match message.WhichOneof("input"):
            case "text":
                field = f"{read.field}.text"
                row = await self._read_text(message.text, field, read, violations)
            case "token_ids":
                field = f"{read.field}.token_ids.ids"
                row = self._read_ids(message.token_ids.ids, field, read, violations)
            case _:
                violations.add(read.field, "is empty; set text or token_ids")
                return None
        refused = read.overflow in (common_pb2.OVERFLOW_UNSPECIFIED, common_pb2.OVERFLOW_ERROR)
        if row is not None and row.truncated and refused:
            n_tokens = len(row.ids) + row.truncated
            violations.add(field, f"has {n_tokens} tokens, more than {read.limit_name} = {read.max_tokens}")
        return row

    async def _read_text(self, text: str, field: str, read: _Reading, violations: Violations) -> TokenRow | None:
        # A text has at least as many bytes as characters. Counting characters is cheap, so a long text fails early.
        limit = self._limits.max_text_bytes
        if len(text) > limit or len(text.encode()) > limit:
            violations.add(field, f"has more bytes than max_text_bytes = {limit}")
            return None
        if not self._has_tokenizer:
            violations.add(field, "the backbone has no tokenizer; send token_ids")
            return None
        try:
            if read.in_thread:
                loop = asyncio.get_running_loop()
                tokenized = await loop.run_in_executor(self._thread, self._tokenize, text)
            else:
                tokenized = self._tokenize(text)
        except ValueError as error:
            violations.add(field, str(error))
            return None
        if not len(tokenized):
            violations.add(field, "gives no tokens; at least one is needed")
            return None
        kept = read.kept(tokenized.ids)
        return TokenRow(kept, len(tokenized) - len(kept), tokenized)

    def _tokenize(self, text: str) -> TokenizedText:
        """ValueError: a text that the model cannot take."""
        tokenized = self._backbone.encode_text(text)
        self._backbone.check_tokens(tokenized)
        return tokenized

    def _read_ids(self, ids: Sequence[int], field: str, read: _Reading, violations: Violations) -> TokenRow | None:
        if not ids:
            violations.add(field, "is empty; at least one token is needed")
            return None
        kept = read.kept(ids)
        if max(kept) >= self._backbone.vocab_size:
            at = next(place for place, token in enumerate(kept) if token >= self._backbone.vocab_size)
            place = at if read.drop == "end" else at + len(ids) - len(kept)
            self._check_token_id(kept[at], f"{field}[{place}]", violations)
        return TokenRow(kept, len(ids) - len(kept), None)

    def _check_token_id(self, token: int, field: str, violations: Violations) -> None:
        vocabulary = self._backbone.vocab_size
        if token >= vocabulary:
            violations.add(field, f"token id {token} is outside the vocabulary of {vocabulary}")

    # Single tokens

    def read_logit_tokens(self, messages: Sequence[causal_pb2.TokenChoice], violations: Violations) -> tuple[int, ...]:
        """The ids of the field `logit_tokens`; can be used if there were no violations."""
        if not violations.check_at_most("logit_tokens", len(messages), "max_logit_tokens"):
            return ()
        tokens = tuple(self.read_token(message, f"logit_tokens[{i}]", violations) for i, message in enumerate(messages))
        if not violations:
            violations.check_distinct("logit_tokens", tokens, lambda token: f"token {token}")
        return tokens

    def read_token(self, message: causal_pb2.TokenChoice, field: str, violations: Violations) -> int:
        """The id of a token that is named by its id or its text; can be used if there were no violations."""
        kind = message.WhichOneof("token")
        if kind == "id":
            self._check_token_id(message.id, f"{field}.id", violations)
            return message.id
        if kind is None:
            violations.add(field, "is empty; set id or text")
        elif not self._has_tokenizer:
            violations.add(f"{field}.text", "the backbone has no tokenizer; set id")
        elif len(message.text.encode()) > self._limits.max_stop_bytes:
            violations.add(f"{field}.text", f"has more bytes than max_stop_bytes = {self._limits.max_stop_bytes}")
        else:
            try:
                ids = self._tokenize(message.text).ids
            except ValueError as error:
                violations.add(f"{field}.text", str(error))
                return 0
            if len(ids) == 1:
                return ids[0]
            violations.add(f"{field}.text", f"{shown(message.text)} is {len(ids)} tokens, expected exactly one")
        return 0

    # Tokens in replies

    def check_include_tokens(self, asked: bool, violations: Violations) -> None:
        """Checks that tokens, if requested, can be described."""
        if asked and not self._has_tokenizer:
            violations.add("include_tokens", "the backbone has no tokenizer")

    def tokens(self, row: TokenRow) -> common_pb2.Tokens:
        """The tokens that are run, as a message."""
        return pack_tokens(*self._describe(row))

    def _describe(self, row: TokenRow) -> tuple[TokenizedText, list[bytes]]:
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

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of tokens; none without a tokenizer."""
        return [self._pieces[token] for token in ids] if self._has_tokenizer else []


def _piece(backbone: Backbone, token: int) -> bytes:
    try:
        return backbone.token_bytes(token)
    except ValueError:  # vocabularies of models are padded beyond their tokenizer's
        return b""
