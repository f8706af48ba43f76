"""Writes service/client/sync.py from service/client/aio.py, or checks that it is fresh.

    python protos/generate_sync.py            # write
    python protos/generate_sync.py --check    # exit 1 if sync.py differs from what would be written

PATTERNS remove asyncio everywhere. PHRASES are the places where the blocking client does or says something else; each
must occur exactly once, so that no change of aio.py slips past it. Both work on the text and not on a syntax tree, to
keep comments, line breaks and the examples in docstrings. ruff then sorts the imports, drops unused ones, and formats.
A word of asyncio that is left is an error, even in a docstring.

Like generate.py, this is a tool of the repository and not of the package: it needs ruff.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parent.parent / "service" / "client"
SOURCE, OUTPUT = CLIENT / "aio.py", CLIENT / "sync.py"

PHRASES = (
    (
        '''"""The client for asyncio code.

protos/generate_sync.py writes sync.py, the client for ordinary code, from this file: run `make proto` after a change.
"""''',
        '''"""The client for ordinary (blocking) code.

Generated from aio.py by protos/generate_sync.py; do not edit. Change aio.py and run `make proto`.
"""''',
    ),
    (
        "a saeserve server from asyncio code. Make it inside a coroutine; close it, or use it in `async with`.",
        "a saeserve server. Safe to use from several threads; close it, or use it in a `with` block.",
    ),
    ("\n\n    A task that is cancelled cancels its call.", ""),
    ("_END_OF_STREAM = cast(Any, grpc.aio).EOF  # missing in grpc-stubs", "_END_OF_STREAM: Any = object()"),
    ("self._channel.close(None)", "self._channel.close()"),
    # A stream's requests are an ordinary iterable, which grpc reads in a thread of its own.
    ("in _asynchronous(requests):", "in requests:"),
    (
        """in this event loop and
        may be asynchronous itself.""",
        """from another thread.
       """,
    ),
    # A generation
    ("then await its result. Leaving `async with`", "then ask for its result. Leaving a `with` block"),
    ("await self._call.read()", "next(self._call, _END_OF_STREAM)"),
    ("raises asyncio.CancelledError", "raises Cancelled"),
)
PATTERNS = (
    (r"\n\nasync def _asynchronous\((.|\n)*", ""),  # the last function of the file
    (r" \| AsyncIterable\[\w+\]", ""),
    (r"(?<!\w)\(await ([\w.]+\(\))\)", r"\1"),
    (r"\bawait ", ""),
    (r"\basync (?=def|for|with)", ""),
    (r"\bAsync(?=Client|Generation|Iterator)", ""),
    (r"\bStopAsyncIteration\b", "StopIteration"),
    (r"\b__a(enter|exit|next)__", r"__\1__"),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"\bgrpc\.aio\b", "grpc"),
)
LEFT_OVER = re.compile(r"async|await|\baio\b(?!\.py)", re.IGNORECASE)


def translate(text: str) -> str:
    """The blocking client, from the text of the asyncio one."""
    for old, new in PHRASES:
        if text.count(old) != 1:
            raise SystemExit(f"found {text.count(old)} times in {SOURCE.name}, expected once: {old}")
        text = text.replace(old, new)
    for pattern, new in PATTERNS:
        text = re.sub(pattern, new, text)
    text = ruff(ruff(text, "check", "--quiet", "--select", "I,F401", "--fix"), "format", "--quiet")
    for number, line in enumerate(text.split("\n"), 1):
        if LEFT_OVER.search(line):
            raise SystemExit(f"line {number} of {OUTPUT.name} still speaks of asyncio: {line.strip()}")
    return text


def ruff(text: str, *command: str) -> str:
    called = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(OUTPUT), "-"]
    return subprocess.run(called, input=text, stdout=subprocess.PIPE, check=True, text=True, cwd=CLIENT).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    text = translate(SOURCE.read_text())
    if not check:
        OUTPUT.write_text(text)
    elif OUTPUT.read_text() != text:
        sys.exit(f"service/client/{OUTPUT.name} is stale, run `make proto`")


if __name__ == "__main__":
    main()
