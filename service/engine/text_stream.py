"""From tokens to streamed text: whole characters only, and nothing that may yet become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of one sequence's tokens into text, up to a stop string.

    What comes out does not depend on where the tokens are cut: the stream stops at the first character that completes a
    stop string (the longest of them, if several end there). Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Longest first, so that it is found first where several end at the same character.
        self._matchers = [_Matcher(text) for text in sorted(stop, key=len, reverse=True)]
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that was met."""

    def push(self, token: bytes) -> str:
        """Takes the next token's bytes and returns the text that is certain now; never more after a stop string."""
        return self._take(self._decoder.decode(token))

    def finish(self) -> str:
        """The end of the sequence: returns what was held back. A character that was cut becomes U+FFFD."""
        text = self._take(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _take(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self._matchers:
            return text
        self._held += text
        for i, char in enumerate(text, start=len(self._held) - len(text) + 1):
            for matcher in self._matchers:
                if matcher.push(char):
                    self.stopped_by = matcher.pattern
                    certain, self._held = self._held[: i - len(matcher.pattern)], ""
                    return certain
        undecided = max(matcher.matched for matcher in self._matchers)
        certain = self._held[: len(self._held) - undecided]
        self._held = self._held[len(certain) :]
        return certain


class _Matcher:
    """Knuth-Morris-Pratt: how much of the pattern's start the text seen so far ends with."""

    def __init__(self, pattern: str) -> None:
        if not pattern:
            raise ValueError("a stop string is empty")
        self.pattern = pattern
        self.matched = 0
        # fallback[n]: length of the longest proper start of pattern[:n] that is also its end.
        self._fallback = [0, 0]
        for n in range(1, len(pattern)):
            length = self._fallback[n]
            while length and pattern[n] != pattern[length]:
                length = self._fallback[length]
            self._fallback.append(length + 1 if pattern[n] == pattern[length] else 0)

    def push(self, char: str) -> bool:
        """Takes one character; true when it completes the pattern."""
        while self.matched and self.pattern[self.matched] != char:
            self.matched = self._fallback[self.matched]
        if self.pattern[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.pattern)
