"""`saeserve`: finds the subcommand and runs it.

Imports only the module of the subcommand that runs: `saeserve --help` needs neither torch nor Ray nor grpc.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

from service.cli.parser import CommandError, CommandParser

COMMANDS = {
    "serve": "serve the model and its dictionaries on this machine",
    "features": "show which features fire on a text",
    "search": "find features by words, or by texts that they fire on",
    "feature": "show what a feature means, or write it",
    "generate": "continue a prompt with features edited",
    "score": "show the loss of texts, without and with edits",
    "ablate": "measure how predictions change without a feature",
    "attribute": "find the features that drive a logit",
    "contrast": "find the features that tell two sets of texts apart",
    "dictionaries": "list the dictionaries of a server, or show one",
    "info": "show a server's versions, model and limits",
    "pull": "fetch a dictionary that others published",
    "tokenize": "turn text into token files for training",
    "cache": "list or delete cached activations",
    "train": "train and publish a dictionary",
    "sweep": "train a grid of dictionaries and fit the scaling law",
    "evaluate": "measure a dictionary on held-out text",
    "catalogue": "find out what the features of a dictionary mean",
    "publish": "turn a dictionary of any format into a published one",
    "export": "write a dictionary in another project's format",
}
"""What each command does. Its module is service.cli.<name>."""

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of an argument in brackets after its help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)
        # argparse ignores the deeper indent of commands, and would break the line after the longest name.
        self._action_max_length = max(map(len, COMMANDS)) + 4

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_default = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        if no_default or not action.option_strings or not action.help or isinstance(action.default, list):
            return action.help
        return f"{action.help} [%(default)s]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    warnings.formatwarning = _one_line  # type: ignore[assignment]  # takes more than it uses
    arguments = [_with_dashes(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        parser, command = _parser(name if name in COMMANDS else None)
        parsed = parser.parse_args(arguments)
        assert command is not None  # argparse has ended the program otherwise
        # Texts can hold any character: one that the terminal's encoding lacks must not end the command.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        code: int = command.run(parsed)
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"saeserve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has closed the pipe: Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _one_line(message: Warning | str, category: type[Warning], *_: object) -> str:
    """How a warning looks: what the library tells users of their files, not where in the code it does so."""
    return f"saeserve: {'' if issubclass(category, UserWarning) else category.__name__ + ': '}{message}\n"


def _parser(name: str | None) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser of all subcommands, and the module of the subcommand `name`, whose arguments alone it has."""
    parser = CommandParser(
        prog="saeserve",
        description="Sparse autoencoders on a live language model: which features fire on a text, and what changes "
        "when they do.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    command = None
    for listed_name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(listed_name, help=summary, formatter_class=HelpFormatter, allow_abbrev=False)
        if listed_name == name:
            command = importlib.import_module(f"service.cli.{name}")
            subparser.description = f"{summary[0].upper()}{summary[1:]}."
            command.add_arguments(subparser)
    return parser, command


class _Version(argparse.Action):
    """Looks the version up only when asked, since that is slow."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"saeserve {metadata.version('saeserve')}")
        parser.exit()


def _with_dashes(argument: str) -> str:
    """Turns the underscores of a flag into dashes: settings have underscores in files, and both are accepted here."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value
