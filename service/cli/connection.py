"""The server that a command calls: its address, and its errors as one line."""

from __future__ import annotations

import argparse
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

from service.cli.parser import WRONG_USAGE, CommandError, seconds
from service.client import Client, SaeserveError, Unavailable
from service.client.channel import DEFAULT_ADDRESS


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--address",
        metavar="HOST:PORT",
        default=os.environ.get("SAESERVE_ADDRESS", DEFAULT_ADDRESS),
        help="gRPC address of the server; the environment variable SAESERVE_ADDRESS changes the default",
    )
    group.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, default=60.0, help="give up on a call after this time"
    )


@contextmanager
def connected(arguments: argparse.Namespace) -> Iterator[Client]:
    """A client whose errors become CommandErrors."""
    address = arguments.address
    with Client(address, timeout_s=arguments.timeout, generate_timeout_s=arguments.timeout) as client:
        try:
            yield client
        except Unavailable as error:
            if error.request_id:
                raise CommandError(f"the server at {address} is not ready: {error.message}") from error
            raise CommandError(
                f"no server answers at {address}; start one with `saeserve serve`, or give another --address"
            ) from error
        except UnicodeEncodeError as error:  # a message holds Unicode text only
            raise CommandError(
                f"{reprlib.repr(error.object)} is not Unicode text: it holds a byte that is not UTF-8, or half of a "
                "surrogate pair",
                WRONG_USAGE,
            ) from error
        except SaeserveError as error:
            raise CommandError(str(error)) from error
