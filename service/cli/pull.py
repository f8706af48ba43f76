"""`saeserve pull`: fetches a published dictionary by its name and converts it."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from sae_runtime.dictionary.formats.published import STORED_DTYPES
from sae_runtime.dictionary.pull.download import DownloadSettings, PullError
from sae_runtime.dictionary.pull.pull import Pulled, PullSettings, pull
from sae_runtime.errors import DictionaryFormatError
from service.cli.parser import CommandError
from service.cli.view.output import add_json_argument, open_console, print_json
from service.cli.view.tables import fact_table, print_table

DEFAULTS = PullSettings(hub_base="")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fetch a dictionary that others published, verify it, and convert it into a folder that can be served. The "
        "same command resumes an interrupted download. No code from a file is run."
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="openai/gpt2-small/<location><suffix>/<layer>, such as openai/gpt2-small/resid_post_mlp_v5_32k/8, or a "
        "Hugging Face repository with SAELens, sparsify or dictionary_learning files: "
        "<owner>/<repository>[@<revision>][/<folder>]",
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="folder to write [NAME with dashes]")
    parser.add_argument(
        "--backbone",
        metavar="MODEL",
        help="model that the dictionary reads: builtin, a folder or a hub name; needed for the hub [GPT-2 small for "
        "OpenAI's]",
    )
    parser.add_argument("--site", metavar="SITE", help="site that it reads, if its files do not say")
    parser.add_argument("--as", dest="published", metavar="NAME", help="name to serve it under [the folder's name]")
    parser.add_argument("--dtype", choices=[*STORED_DTYPES], default=DEFAULTS.dtype, help="type of the stored weights")
    parser.add_argument("--openai-base", metavar="URL", default=DEFAULTS.openai_base, help="address of OpenAI's files")
    parser.add_argument("--hub-base", metavar="URL", help="address of the Hugging Face hub [HF_ENDPOINT]")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        default=DEFAULTS.download.timeout_s,
        help="give up on a silent server after this time",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out or Path(arguments.name.strip("/").replace("/", "-").replace("@", "-"))
    settings = PullSettings(
        openai_base=arguments.openai_base,
        backbone=arguments.backbone,
        site=arguments.site,
        name=arguments.published,
        dtype=arguments.dtype,
        download=DownloadSettings(timeout_s=arguments.timeout),
        **({} if arguments.hub_base is None else {"hub_base": arguments.hub_base}),
    )
    try:
        with _Bars(open_console(stderr=True)) as bars:
            pulled = pull(arguments.name, out, settings, bars.show)
    except (OSError, ValueError, PullError, DictionaryFormatError) as error:
        raise CommandError(str(error)) from error
    _print(pulled, as_json=arguments.json)
    return 0


def _print(pulled: Pulled, *, as_json: bool) -> None:
    manifest = pulled.manifest
    if as_json:
        files = [
            {"name": f.path.name, "url": f.url, "bytes": f.size, "sha256": f.sha256, "verified": list(f.verified)}
            for f in pulled.files
        ]
        print_json({"path": str(pulled.path), "name": manifest.name, "license": pulled.license, "files": files})
        return
    console = open_console()
    console.print(f"Published {manifest.name} in {pulled.path}", soft_wrap=True)
    rows = {
        "site": manifest.site,
        "latents": f"{manifest.n_latents:,} over width {manifest.d_in:,}, {manifest.architecture}",
        "backbone": manifest.backbone.name,
        "licence": pulled.license or "not stated",
    }
    for file in pulled.files:
        checked = ", ".join(file.verified) or "nothing to compare with"
        rows[file.path.name] = f"{file.size:,} bytes, sha256 {file.sha256[:16]}…, checked: {checked}"
    print_table(console, fact_table(rows))
    console.print(f"Serve it: saeserve serve --dictionaries {pulled.path}", soft_wrap=True)


class _Bars:
    """A progress bar for each file, on a terminal only."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, name: str, done: int, total: int | None) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)
