"""A dictionary by its name: fetched, verified, converted and published into a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from sae_runtime.dictionary.formats import load_dictionary
from sae_runtime.dictionary.manifest import Manifest, Provenance
from sae_runtime.dictionary.publish import publish
from sae_runtime.dictionary.pull.download import DownloadSettings, Fetched, Progress, RemoteFile, check_url, download
from sae_runtime.dictionary.pull.hub import find_hub_folder
from sae_runtime.dictionary.pull.names import HubName, parse_name
from sae_runtime.model.backbone import Backbone
from sae_runtime.model.sites import Site
from sae_runtime.version import code_version

OPENAI_BASE = "https://openaipublic.blob.core.windows.net"
OPENAI_LICENSE = "mit"  # of the repository that published them
OPENAI_BACKBONE = "openai-community/gpt2"


def hub_endpoint() -> str:
    """The Hugging Face hub's address, as the package huggingface_hub has it (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@dataclass(frozen=True)
class PullSettings:
    """Where dictionaries come from and how they are stored."""

    openai_base: str = OPENAI_BASE
    """Address of the storage account `openaipublic`."""
    hub_base: str = field(default_factory=hub_endpoint)
    backbone: str | None = None
    """The model that the dictionary belongs to: builtin, a folder or a hub name; GPT-2 small for OpenAI's if None.

    It is loaded to check that the dictionary fits, and its fingerprint is recorded."""
    site: str | None = None
    """Where its activations are read, if its files do not say; needed for few."""
    name: str | None = None
    """Of the published dictionary; its folder's name if not given."""
    dtype: str = "float32"
    """Of the stored weights: float16, bfloat16 or float32."""
    download: DownloadSettings = field(default_factory=DownloadSettings)


@dataclass(frozen=True)
class Pulled:
    """What was fetched and published."""

    path: Path
    manifest: Manifest
    files: tuple[Fetched, ...]
    license: str | None


def pull(name: str, out: Path, settings: PullSettings | None = None, progress: Progress | None = None) -> Pulled:
    """Fetches a dictionary by its name (see names.py) and publishes it into the folder `out`.

    What is fetched waits in "<out>.download" until the dictionary is published, so an interrupted call goes on there.
    No code of a file is ever run.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the name has another form; the dictionary does not fit the backbone; no site is known.
        PullError: there is no such dictionary, the server fails for good, or a checksum is wrong.
        DictionaryFormatError: the files are not a dictionary of a known format.
        OSError: the disk is full; what was fetched is kept.
    """
    settings = settings or PullSettings()
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    wanted = _wanted(name, settings)
    backbone = Backbone.load(wanted.backbone)  # before gigabytes are fetched
    waiting = out.with_name(out.name + ".download")
    folder = waiting / wanted.folder
    fetched = tuple(_fetch(file, folder, settings, progress) for file in wanted.files)
    dictionary = load_dictionary(folder if wanted.is_folder else fetched[0].path)
    site = settings.site or wanted.site or dictionary.site
    dictionary = replace(dictionary, site=site, name=settings.name or out.name)
    dictionary.require_site()
    origin, before = dictionary.origin, dictionary.manifest
    manifest = publish(
        dictionary,
        out,
        backbone,
        dtype=settings.dtype,
        provenance=Provenance(
            code_version=code_version(),
            config={
                "pulled": name,
                "version": wanted.version,
                "license": wanted.license,
                "format": origin.format if origin else "saeserve",
                "hook": origin.hook if origin else None,
                "model": origin.model if origin else before.backbone.name if before else None,
                "files": {file.path.name: _record(file) for file in fetched},
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )
    shutil.rmtree(waiting)
    return Pulled(out, manifest, fetched, wanted.license)


@dataclass(frozen=True)
class _Wanted:
    """What a name stands for."""

    files: tuple[RemoteFile, ...]
    is_folder: bool
    """The files are read together."""
    folder: str
    """Name of the folder they are put into: sparsify's dictionaries are named by it."""
    backbone: str
    site: str | None
    version: str | None
    license: str | None


def _wanted(name: str, settings: PullSettings) -> _Wanted:
    parsed = parse_name(name)
    if settings.site is not None:
        Site.parse(settings.site)
    if isinstance(parsed, HubName):
        # Without a backbone nothing is looked up: a name on the hub says too little about the model it belongs to.
        if settings.backbone is None:
            raise ValueError(f"give the backbone that {name} belongs to")
        endpoint = settings.hub_base.rstrip("/")
        check_url(endpoint)
        found = find_hub_folder(parsed, endpoint, settings.download)
        last = PurePosixPath(parsed.folder or parsed.repository).name
        return _Wanted(found.files, True, last, settings.backbone, None, found.commit, found.license)
    url = f"{settings.openai_base.rstrip('/')}/{parsed.path}"
    file = RemoteFile(url, f"{parsed.layer}.pt")
    backbone = settings.backbone or OPENAI_BACKBONE
    return _Wanted((file,), False, parsed.location, backbone, parsed.site, None, OPENAI_LICENSE)


def _fetch(file: RemoteFile, folder: Path, settings: PullSettings, progress: Progress | None) -> Fetched:
    """Fetches a file, unless an earlier call did and it is still what was fetched."""
    note = folder / f"{file.name}.fetched"
    try:
        record = json.loads(note.read_text())
        path = folder / file.name
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        expected = (file.url, sha256, file.size or record["bytes"], file.sha256 or sha256)
        if (record["url"], record["sha256"], record["bytes"], record["sha256"]) == expected:
            return Fetched(path, file.url, record["bytes"], sha256, tuple(record["verified"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole: fetched again
    fetched = download(file, folder, settings.download, progress)
    note.write_text(json.dumps(_record(fetched)))
    return fetched


def _record(file: Fetched) -> dict[str, Any]:
    return {"url": file.url, "bytes": file.size, "sha256": file.sha256, "verified": list(file.verified)}
