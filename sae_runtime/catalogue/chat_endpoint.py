"""Requests to an OpenAI-compatible chat endpoint: bounded in number, size and time, repeated with back-off."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import IO
from urllib.parse import urlsplit

MAX_ANSWER_BYTES = 1 << 20
_FIRST_WAIT_S, _MAX_WAIT_S = 1.0, 60.0
_REPEATED_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)


class EndpointError(Exception):
    """There is no usable answer; the message says why."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key along to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


@dataclass
class ChatEndpoint:
    """One model of an endpoint."""

    url: str
    """Up to and with the version, as OpenAI's clients have it: "http://127.0.0.1:8080/v1"."""
    model: str
    key: str = field(default="", repr=False)
    max_requests: int = 1_000
    """Requests in all, repeated ones included."""
    timeout_s: float = 60.0
    """Of one request."""
    attempts: int = 4
    """Requests for one answer: a busy or broken endpoint is asked again after 1, 2, 4, ... seconds."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    n_requests: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url!r} is not an http or https URL")
        if self.attempts < 1 or self.max_requests < 0 or self.timeout_s <= 0:
            raise ValueError("attempts must be at least 1, max_requests at least 0, timeout_s above 0")
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def requests_left(self) -> int:
        return self.max_requests - self.n_requests

    def answer(self, system: str, user: str) -> str:
        """The model's answer to a question, as text.

        Raises:
            EndpointError: no answer after all attempts, the budget is spent, or the answer has another form.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": 0,
        }
        data = self._post(json.dumps(body).encode())
        try:
            content = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise EndpointError(f"the endpoint's reply is no chat completion: {data[:80]!r}") from error
        if not isinstance(content, str):
            raise EndpointError(f"the endpoint's answer is {type(content).__name__}, expected text")
        return content

    def _post(self, body: bytes) -> bytes:
        wait = _FIRST_WAIT_S
        for attempt in range(1, self.attempts + 1):
            if not self.requests_left:
                raise EndpointError(f"the budget of {self.max_requests} requests is spent")
            self.n_requests += 1
            try:
                return self._post_once(body)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                asked = error.headers.get("Retry-After", "") if error.headers else ""
                error.close()
                if error.code not in _REPEATED_STATUSES:
                    raise EndpointError(reason) from error
                wait = max(wait, float(asked)) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", "") or error or type(error).__name__)
            if attempt < self.attempts:
                self.sleep(min(wait, _MAX_WAIT_S))
                wait *= 2
        raise EndpointError(f"no answer after {self.attempts} attempts: {reason}")

    def _post_once(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        deadline = time.monotonic() + self.timeout_s
        data = bytearray()
        with self._opener.open(request, timeout=self.timeout_s) as response:
            while chunk := response.read1(1 << 16):
                data += chunk
                if len(data) > MAX_ANSWER_BYTES:
                    raise EndpointError(f"the endpoint's reply is over {MAX_ANSWER_BYTES:,} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the reply took over {self.timeout_s:g} s")
        return bytes(data)
