"""`saeserve generate`: continues a prompt, with features edited."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from service.cli.argument_types import natural, seed
from service.cli.connection import add_connection_arguments, connected
from service.cli.edit_options import add_edit_arguments, describe, resolve_edits
from service.cli.json_output import print_json
from service.client import Client, Edit, GenerationResult
from service.client.messages import GenerateOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    add_edit_arguments(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=natural, metavar="N", help="most tokens to generate [the server's default]"
    )
    sampling.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    sampling.add_argument("--top-k", type=natural, metavar="K", help="choose among the K likeliest tokens [all]")
    sampling.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="choose among the likeliest tokens that have this probability together [1]",
    )
    sampling.add_argument("--seed", type=seed, metavar="N", help="seed of the random choices [drawn by the server]")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (can be repeated)"
    )
    sampling.add_argument("--ignore-end-of-text", action="store_true", help="go on after an end-of-text token")
    parser.add_argument("--truncate", action="store_true", help="drop the start of a prompt that is too long")
    parser.add_argument("--compare", action="store_true", help="run without the edits first, with the same seed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        edits = resolve_edits(arguments, lambda: client.server_info().dictionaries)
        options: GenerateOptions = {
            "max_new_tokens": arguments.max_new_tokens,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
            "seed": arguments.seed,
            "stop": arguments.stop,
            "ignore_end_of_text": arguments.ignore_end_of_text,
            "overflow": "truncate" if arguments.truncate else "error",
        }
        if arguments.json:
            _print_json(client, arguments, edits, options)
        elif arguments.compare:
            plain = _stream(client, arguments.prompt, [], options, heading="without edits")
            _stream(client, arguments.prompt, edits, {**options, "seed": plain.seed}, heading=describe(edits))
        else:
            _stream(client, arguments.prompt, edits, options, heading=describe(edits) if edits else "")
    return 0


def _stream(
    client: Client, prompt: str, edits: Sequence[Edit], options: GenerateOptions, *, heading: str
) -> GenerationResult:
    """Prints the text on standard output as it arrives; what is said about it goes to standard error."""
    out, about = Console(highlight=False), Console(stderr=True, highlight=False)
    if heading:
        about.print(Text(heading, style="bold cyan"))
    started = time.perf_counter()
    with client.generate(prompt, edits, **options) as generation:
        first = next(generation, None)  # an error must not be preceded by half an answer
        out.print(Text(prompt, style="dim"), end="", soft_wrap=True)
        for chunk in itertools.chain(filter(None, [first]), generation):
            out.print(Text(chunk.text), end="", soft_wrap=True)
            out.file.flush()
        result = generation.result()
    seconds = time.perf_counter() - started
    out.print()
    rate = f"{result.generated_tokens / seconds:.0f} tokens/s"
    cut = f", {result.truncated_tokens:,} tokens of the prompt cut off" if result.truncated_tokens else ""
    about.print(
        Text(f"{result.generated_tokens} tokens, {_reason(result)}, seed {result.seed}, {rate}{cut}\n", style="dim")
    )
    return result


def _reason(result: GenerationResult) -> str:
    reasons = {"length": "length reached", "stop": f"met {result.stop!r}", "end_of_text": "end of text"}
    return reasons.get(result.finish_reason, result.finish_reason)


def _print_json(client: Client, arguments: argparse.Namespace, edits: Sequence[Edit], options: GenerateOptions) -> None:
    def run_once(edits: Sequence[Edit], options: GenerateOptions) -> dict[str, Any]:
        result = asdict(client.generate(arguments.prompt, edits, **options).result())
        return {"prompt": arguments.prompt, "edits": [asdict(edit) for edit in edits], **result}

    if not arguments.compare:
        print_json(run_once(edits, options))
        return
    plain = run_once([], options)
    print_json({"unedited": plain, "edited": run_once(edits, {**options, "seed": plain["seed"]})})
