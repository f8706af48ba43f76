"""`saeserve cache`: lists or deletes cached activations."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Column, Table

from sae_runtime.training.activations.cache import CacheGroup, clear_cache, list_groups
from service.cli.parser import WRONG_USAGE, CommandError
from service.cli.view.output import add_json_argument, open_console, print_json
from service.cli.view.tables import data_table, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List or delete the activations that `saeserve train --cache FOLDER` keeps. A running training computes "
        "deleted activations again."
    )
    parser.add_argument("action", choices=["list", "clear"], help="list the groups of activations, or delete them")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the cache")
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help="delete only these groups, named as in the list [all]"
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.action == "clear":
            groups = clear_cache(arguments.folder, arguments.groups or None)
        elif arguments.groups:
            raise CommandError("GROUP belongs to `clear`", WRONG_USAGE)
        else:
            groups = list_groups(arguments.folder)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if arguments.json:
        print_json([_facts(group) for group in groups])
        return 0
    console = open_console()
    total = sum(group.bytes for group in groups) / 1e9
    if arguments.action == "clear":
        console.print(f"Deleted {len(groups)} groups, {total:.3f} GB")
    elif not groups:
        console.print(f"No cached activations in {arguments.folder}", soft_wrap=True)
    else:
        print_table(console, _table(groups))
        console.print(f"{total:.3f} GB in {arguments.folder}", soft_wrap=True)
    return 0


def _facts(group: CacheGroup) -> dict[str, object]:
    return {
        "group": group.name,
        "bytes": group.bytes,
        "passes": group.passes,
        "used": datetime.fromtimestamp(group.used, UTC).isoformat(timespec="seconds"),
        **group.description,
    }


def _table(groups: list[CacheGroup]) -> Table:
    table = data_table("group", Column("backbone"), "passes", "GB", Column("last used (UTC)"))
    for group in groups:
        used = datetime.fromtimestamp(group.used, UTC).strftime("%Y-%m-%d %H:%M")
        backbone = str(group.description.get("backbone", ""))
        table.add_row(group.name, backbone, f"{group.passes:,}", f"{group.bytes / 1e9:.3f}", used)
    return table
