"""A flag that is given twice gathers values where a list is meant, and is an error elsewhere."""

import argparse
from collections.abc import Callable

import pytest

from service.cli.main import COMMANDS, _parser

Saeserve = Callable[..., tuple[int, str, str]]
LISTS = {
    "catalogue": {"--data", "--neighbor-dictionaries"},
    "serve": {"--dictionaries"},
    "features": {"--file", "--dictionary", "--feature"},
    "generate": {"--preset", "--stop", "--show-features"},
    "score": {"--file", "--logit-token", "--preset"},
    "ablate": {"--file", "--feature", "--dictionary", "--ablation", "--logit-token"},
    "attribute": {"--dictionary"},
    "contrast": {"--a", "--b", "--a-text", "--b-text", "--dictionary"},
    "tokenize": {"--sources"},
    "train": {"--sites", "--data", "--held-out", "--matryoshka-fractions"},
    "sweep": {"--sites", "--data", "--held-out", "--matryoshka-fractions", "--grid-n-latents", "--grid-k"},
    "evaluate": {"--data"},
    "publish": {"--data"},
    "search": {"--fires-on", "--silent-on", "--dictionary"},
}
"""Flags that gather, by command. Those of edits have tests of their own."""
EDITS = {"--set", "--add", "--scale", "--clamp", "--ablate", "--ablate-mean", "--resample", "--replace", "--edits"}
VALUES = {"--where": "1 > 0", "--resample": "1=a", "--dictionaries": "a"}


def options_of(command: str) -> tuple[argparse.ArgumentParser, list[argparse.Action]]:
    """A command's parser without what it demands, and its flags that take a value or have a --no- form."""
    parser, _ = _parser(command)
    (subparsers,) = [action for action in parser._actions if action.metavar == "COMMAND"]
    subparser: argparse.ArgumentParser = subparsers.choices[command]  # type: ignore[index]
    for action in subparser._actions:
        action.required = False
    flags = [action for action in subparser._actions if action.option_strings]
    return subparser, [
        action for action in flags if action.nargs != 0 or isinstance(action, argparse.BooleanOptionalAction)
    ]


def occurrence(action: argparse.Action, value: str) -> list[str]:
    return [action.option_strings[-1]] + ([value] if action.nargs != 0 else [])


CASES = [
    (command, action.option_strings[0])
    for command in COMMANDS
    for action in options_of(command)[1]
    if action.option_strings[0] not in EDITS
]


@pytest.mark.parametrize(("command", "flag"), CASES)
def test_every_flag_given_twice(capsys: pytest.CaptureFixture[str], command: str, flag: str) -> None:
    parser, actions = options_of(command)
    (action,) = [action for action in actions if action.option_strings[0] == flag]
    first, second = (list(action.choices or [])[:2] * 2)[:2] if action.choices else [VALUES.get(flag, "1")] * 2
    line = [*occurrence(action, first), *occurrence(action, second)]
    if flag in LISTS.get(command, ()):
        values = getattr(parser.parse_args(line), action.dest)
        assert len(values) == 2, "both values are kept"
    else:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(line)
        assert ended.value.code == 2
        assert "given twice, expected once" in capsys.readouterr().err


def test_lists_gather_in_their_order() -> None:
    parser, _ = _parser("train")
    parsed = parser.parse_args(["train", "--data", "a", "b", "--k", "3", "--data", "c"])
    assert parsed.data == ["a", "b", "c"]
    parser, _ = _parser("sweep")
    grid = parser.parse_args(["sweep", "--grid-k", "4,8", "--grid-k", "16", "--grid-n-latents", "64"])
    assert grid.grid_k == [4, 8, 16]


def test_edits_keep_the_order_of_their_flags() -> None:
    parser, _ = _parser("generate")
    parsed = parser.parse_args(["generate", "a", "--set", "1=2", "--ablate", "3", "--set", "4=5"])
    assert [edit.target.feature for edit in parsed.edits] == [1, 3, 4]


def test_the_error_names_the_flag(saeserve: Saeserve) -> None:
    code, out, err = saeserve("generate", "a", "--seed", "1", "--seed=2")
    assert (code, out) == (2, "")
    assert "argument --seed: given twice, expected once" in err
    assert "argument --normalize/--no-normalize: given twice" in saeserve("train", "--normalize", "--no-normalize")[2]


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (["publish", "a", "b", "--model-path", "m"], "--model-path: use --backbone"),
        (["train", "--model=m"], "--model: use --backbone"),
        (["features", "a", "--model", "m"], "--model: the server holds the model: `saeserve serve --backbone MODEL`"),
        (["evaluate", "--sae", "s"], "--sae: use DICTIONARY, without a flag"),
        (["serve", "--sae", "s"], "--sae: use --dictionaries"),
        (["ablate", "a", "--autoencoder", "s"], "--autoencoder: use --dictionary"),
        (["info", "--sae", "s"], "--sae: `saeserve serve --dictionaries PATH` serves a dictionary"),
        (["train", "--hook_point", "blocks.8.hook_resid_post"], "--hook-point: use --site"),
        (["publish", "a", "b", "--layer", "8"], "--layer: use --site"),
        (["train", "--lr", "1e-4"], "--lr: use --learning-rate"),
        (["train", "--d-sae", "512"], "--d-sae: use --n-latents"),
    ],
)
def test_flags_of_other_projects_lead_to_ours(saeserve: Saeserve, command: list[str], hint: str) -> None:
    code, out, err = saeserve(*command)
    assert (code, out) == (2, "")
    assert any(line.startswith(hint) for line in err.splitlines()), err
    assert err.splitlines()[-1] == f"`saeserve {command[0]} --help` lists all arguments."


def test_a_flag_of_ours_gets_no_hint(saeserve: Saeserve) -> None:
    assert saeserve("train", "--context-length", "8", "--nonsense")[2].splitlines() == [
        "saeserve train: error: unrecognized arguments: --nonsense",
        "`saeserve train --help` lists all arguments.",
    ]
