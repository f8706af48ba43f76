"""`saeserve generate`: continues a prompt, with features edited."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from service.cli.argument_types import natural, seed
from service.cli.command_error import CommandError
from service.cli.connection import add_connection_arguments, connected
from service.cli.edit_options import add_edit_arguments, describe, preset_edits, resolve_edits
from service.cli.generation_view import GenerationView
from service.cli.json_output import print_json
from service.client import Edit, GenerationResult
from service.client.options import GenerateOptions


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
    sampling.add_argument(
        "--repetition-penalty", type=float, metavar="P", help="make tokens that occurred less likely: 1.2 is common [1]"
    )
    sampling.add_argument("--seed", type=seed, metavar="N", help="seed of the random choices [drawn by the server]")
    sampling.add_argument("--n", type=natural, metavar="N", help="generate N samples [1]")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (can be repeated)"
    )
    sampling.add_argument("--ignore-end-of-text", action="store_true", help="go on after an end-of-text token")
    parser.add_argument("--truncate", action="store_true", help="drop the start of a prompt that is too long")
    parser.add_argument("--compare", action="store_true", help="run beside the same without the edits, from one seed")
    shown = parser.add_argument_group("what to show of each token")
    shown.add_argument("--top-logprobs", type=natural, metavar="K", help="the K likeliest tokens at its place")
    shown.add_argument(
        "--show-features",
        action="append",
        metavar="NAME",
        help="the features of this dictionary that fire on it (can be repeated)",
    )
    shown.add_argument(
        "--features-per-token", type=natural, metavar="K", help="how many of them [the server's default]"
    )
    shown.add_argument("--prompt-features", action="store_true", help="also those of the prompt's tokens")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    watches = arguments.show_features is not None
    if not watches and (arguments.prompt_features or arguments.features_per_token is not None):
        raise CommandError("--prompt-features and --features-per-token belong to --show-features NAME", exit_code=2)
    with connected(arguments) as client:
        edits = resolve_edits(arguments, lambda: client.server_info().dictionaries)
        shown = list(edits)
        if arguments.presets:
            shown = preset_edits(arguments.presets, client.server_info().edit_presets) + shown
        options: GenerateOptions = {
            "max_new_tokens": arguments.max_new_tokens,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
            "repetition_penalty": arguments.repetition_penalty,
            "seed": arguments.seed,
            "samples": arguments.n,
            "stop": arguments.stop,
            "ignore_end_of_text": arguments.ignore_end_of_text,
            "overflow": "truncate" if arguments.truncate else "error",
            "presets": arguments.presets,
            "compare": arguments.compare,
            "top_logprobs": arguments.top_logprobs,
            "features": arguments.show_features,
            "features_top_k": arguments.features_per_token,
            "prompt_features": arguments.prompt_features,
        }
        started = time.perf_counter()
        with client.generate(arguments.prompt, edits, **options) as generation:
            if arguments.json:
                _print_json(arguments, shown, generation.all_results())
                return 0
            several = arguments.compare or (arguments.n or 1) > 1
            view = GenerationView(arguments.prompt, describe(shown) if shown else "", several=several)
            for chunk in generation:
                view.add(chunk)
            results = generation.all_results()
        view.finish(results, time.perf_counter() - started)
    return 0


def _print_json(arguments: argparse.Namespace, edits: Sequence[Edit], results: Sequence[GenerationResult]) -> None:
    def described(result: GenerationResult) -> dict[str, Any]:
        own = [] if result.unedited else [asdict(edit) for edit in edits]
        return {"prompt": arguments.prompt, "edits": own, **asdict(result)}

    def of(unedited: bool) -> Any:
        chosen = [described(result) for result in results if result.unedited == unedited]
        return chosen if arguments.n is not None else chosen[0]

    print_json({"unedited": of(True), "edited": of(False)} if arguments.compare else of(False))
