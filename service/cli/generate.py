"""`saeserve generate`: continues a prompt with features edited."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from service.cli.connection import add_connection_arguments, connected
from service.cli.edit_options import add_edit_arguments, describe, resolve_edits
from service.cli.parser import WRONG_USAGE, CommandError, natural, seed
from service.cli.ranking import add_ranking_argument, chosen_ranking
from service.cli.view.generation import GenerationView
from service.cli.view.output import add_json_argument, print_json
from service.client import Edit, GenerationResult
from service.client.options import GenerateOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    add_edit_arguments(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=natural, metavar="N", help="generate at most N tokens [the server's default]"
    )
    sampling.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="sampling temperature; 0 takes the likeliest token"
    )
    sampling.add_argument("--top-k", type=natural, metavar="K", help="sample among the K likeliest tokens [all]")
    sampling.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample among the likeliest tokens that together have probability P [1]",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="P",
        help="make tokens less likely that occur already; 1.2 is usual [1]",
    )
    sampling.add_argument("--seed", type=seed, metavar="N", help="random seed [drawn by the server]")
    sampling.add_argument("--n", type=natural, metavar="N", help="generate N samples [1]")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text (can be repeated)"
    )
    sampling.add_argument("--ignore-end-of-text", action="store_true", help="continue after an end-of-text token")
    parser.add_argument("--truncate", action="store_true", help="drop the start of a prompt that is too long")
    parser.add_argument("--compare", action="store_true", help="also generate without the edits, from the same seed")
    details = parser.add_argument_group("token details")
    details.add_argument(
        "--top-logprobs", type=natural, metavar="K", help="show the K likeliest tokens at each position"
    )
    details.add_argument(
        "--show-features",
        action="append",
        metavar="NAME",
        help="show the features of this dictionary that fire on each token (can be repeated)",
    )
    details.add_argument(
        "--features-per-token", type=natural, metavar="K", help="show K features of each token [the server's default]"
    )
    add_ranking_argument(details)
    details.add_argument("--prompt-features", action="store_true", help="also show the features of the prompt")
    add_json_argument(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    named = (arguments.prompt_features, arguments.features_per_token is not None, arguments.rank_by is not None)
    if arguments.show_features is None and any(named):
        raise CommandError(
            "--prompt-features, --features-per-token and --rank-by belong to --show-features NAME", WRONG_USAGE
        )
    with connected(arguments) as client:
        edits, preset_edits = resolve_edits(arguments, client)
        all_edits = preset_edits + edits
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
        if arguments.show_features is not None:
            options["labels"] = True
            options["features_rank_by"] = chosen_ranking(arguments.rank_by, arguments.show_features, client)
        started = time.perf_counter()
        with client.generate(arguments.prompt, edits, **options) as generation:
            if arguments.json:
                _print_json(arguments, all_edits, generation.all_results())
                return 0
            view = GenerationView(
                arguments.prompt,
                describe(all_edits) if all_edits else "",
                samples=arguments.n or 1,
                compare=arguments.compare,
            )
            for chunk in generation:
                view.add(chunk)
            results = generation.all_results()
        view.finish(results, time.perf_counter() - started)
    return 0


def _print_json(arguments: argparse.Namespace, edits: Sequence[Edit], results: Sequence[GenerationResult]) -> None:
    def described(result: GenerationResult) -> dict[str, Any]:
        applied = [] if result.unedited else [asdict(edit) for edit in edits]
        return {"prompt": arguments.prompt, "edits": applied, **asdict(result)}

    def samples(unedited: bool) -> Any:
        """A list with --n, else the only sample."""
        documents = [described(result) for result in results if result.unedited == unedited]
        return documents if arguments.n is not None else documents[0]

    print_json({"unedited": samples(True), "edited": samples(False)} if arguments.compare else samples(False))
