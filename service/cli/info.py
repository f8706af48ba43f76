"""`saeserve info`: the server's versions, model and limits."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from service.cli.connection import add_connection_arguments, connected
from service.cli.view.output import add_json_argument, open_console, print_json
from service.cli.view.tables import fact_table, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_argument(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    with connected(arguments) as client:
        info = client.server_info()
    if arguments.json:
        print_json(info)
        return 0
    backbone = info.backbone
    versions = ", ".join(f"{name} {version}" for name, version in sorted(info.library_versions.items()))
    facts = {
        "server": f"saeserve {info.version} at {arguments.address}, on {info.device}",
        "libraries": versions,
        "backbone": f"{backbone.name}: {backbone.n_layers} layers, width {backbone.d_model}, "
        f"vocabulary {backbone.vocab_size:,}, context {backbone.context_length:,}, {backbone.dtype}",
        "fingerprint": backbone.fingerprint,
        "sites": ", ".join(backbone.sites),
        "dictionaries": ", ".join(info.dictionaries),
        "edit presets": ", ".join(preset.name for preset in info.edit_presets) or "none",
    }
    facts |= {"notes": "\n".join(info.notes)} if info.notes else {}
    console = open_console()
    print_table(console, fact_table(facts))
    limits = {
        name: f"{limit:,g}" if isinstance(limit, float) else f"{limit:,}" for name, limit in asdict(info.limits).items()
    }
    table = fact_table(limits)
    table.title, table.title_justify, table.title_style = "Limits of requests", "left", "bold"
    console.print()
    print_table(console, table)
    return 0
