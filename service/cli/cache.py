"""`saeserve cache`: shows what a cache of activations holds, or deletes it."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from sae_runtime.training.activations.cache import CacheGroup, clear_cache, list_groups
from service.cli.command_error import CommandError
from service.cli.json_output import print_json
from service.cli.tables import data_table, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Lists or deletes the activations that `saeserve train --cache FOLDER` keeps. Trainings that are using them "
        "compute them again."
    )
    parser.add_argument("action", choices=["list", "clear"], help="what to do")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the cache")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="clear only these, as listed; all if none is given")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.action == "clear":
            groups = clear_cache(arguments.folder, arguments.groups or None)
        elif arguments.groups:
            raise CommandError("GROUP belongs to `clear`", exit_code=2)
        else:
            groups = list_groups(arguments.folder)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if arguments.json:
        print_json([_facts(group) for group in groups])
        return 0
    console = Console(highlight=False, markup=False)
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
    table = data_table("group", Column("backbone"), "passes", "GB", Column("last used"))
    for group in groups:
        used = datetime.fromtimestamp(group.used, UTC).strftime("%Y-%m-%d %H:%M")
        backbone = str(group.description.get("backbone", ""))
        table.add_row(group.name, backbone, f"{group.passes:,}", f"{group.bytes / 1e9:.3f}", used)
    return table
