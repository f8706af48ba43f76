"""Fetches a dictionary by its name, verifies it, converts it and publishes it into a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from sae_runtime.dictionary.formats import load_dictionary
from sae_runtime.dictionary.formats.saelens_config import UNRECORDED_PROCESSING
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
    """The Hugging Face hub's address from the package huggingface_hub (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@dataclass(frozen=True)
class PullSettings:
    """Where dictionaries come from and how they are stored."""

    openai_base: str = OPENAI_BASE
    """Address of the storage account `openaipublic`."""
    hub_base: str = field(default_factory=hub_endpoint)
    backbone: str | None = None
    """The model that the dictionary belongs to: builtin, a folder or a hub name. None: GPT-2 small, for OpenAI's only.

    The model is loaded to check that the dictionary fits, and its fingerprint is recorded."""
    site: str | None = None
    """The site that the dictionary reads, if its files do not name it."""
    name: str | None = None
    """Of the published dictionary; its folder's name if not given."""
    dtype: str = "float32"
    """Of the stored weights: float16, bfloat16 or float32."""
    download: DownloadSettings = field(default_factory=DownloadSettings)


@dataclass(frozen=True)
class Pulled:
    """A dictionary that was fetched and published."""

    path: Path
    manifest: Manifest
    files: tuple[Fetched, ...]
    license: str | None


def pull(name: str, out: Path, settings: PullSettings | None = None, progress: Progress | None = None) -> Pulled:
    """Fetches a dictionary by its name (see names.py) and publishes it into the folder `out`.

    Downloads stay in "<out>.download" until the dictionary is published, so that an interrupted call can be resumed.
    No code in a file is ever run.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the name has another form; the dictionary does not fit the backbone; no site is known.
        PullError: there is no such dictionary, the server keeps failing, or a checksum is wrong.
        DictionaryFormatError: the files are not a dictionary of a known format.
        OSError: the disk is full; what was fetched is kept.
    """
    settings = settings or PullSettings()
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    source = _look_up(name, settings)
    backbone = Backbone.load(source.backbone)  # so that it fails before gigabytes are fetched
    downloads = out.with_name(out.name + ".download")
    folder = downloads / source.folder
    fetched = tuple(_fetch(file, folder, settings, progress) for file in source.files)
    with warnings.catch_warnings():
        if source.centred:
            warnings.filterwarnings("ignore", UNRECORDED_PROCESSING)
        dictionary = load_dictionary(folder if source.is_folder else fetched[0].path)
    if source.centred and dictionary.normalization == "none":
        dictionary = replace(dictionary, normalization="centred")
    site = settings.site or source.site or dictionary.site
    dictionary = replace(dictionary, site=site, name=settings.name or out.name)
    dictionary.require_site()
    origin, fetched_manifest = dictionary.origin, dictionary.manifest
    model = fetched_manifest.backbone.name if fetched_manifest is not None else None
    if origin is not None:
        model = origin.model
    manifest = publish(
        dictionary,
        out,
        backbone,
        dtype=settings.dtype,
        provenance=Provenance(
            code_version=code_version(),
            config={
                "pulled": name,
                "version": source.version,
                "license": source.license,
                "format": origin.format if origin else "saeserve",
                "hook": origin.hook if origin else None,
                "model": model,
                "prepend_bos": dictionary.prepend_bos,
                "files": {file.path.name: _record(file) for file in fetched},
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )
    shutil.rmtree(downloads)
    return Pulled(out, manifest, fetched, source.license)


@dataclass(frozen=True)
class _Source:
    """Where a dictionary's files are, and what is known about it beforehand."""

    files: tuple[RemoteFile, ...]
    is_folder: bool
    """Whether the files form a folder that is read as a whole."""
    folder: str
    """Name of the download folder. A sparsify dictionary is named by its folder."""
    backbone: str
    site: str | None
    version: str | None
    license: str | None
    centred: bool = False
    """Whether it reads a centred residual stream, whatever its files say."""


def _look_up(name: str, settings: PullSettings) -> _Source:
    parsed = parse_name(name)
    if settings.site is not None:
        Site.parse(settings.site)
    if isinstance(parsed, HubName):
        # A name on the hub says too little about the model, so without a backbone nothing is looked up.
        if settings.backbone is None:
            raise ValueError(f"give the backbone that {name} belongs to")
        endpoint = settings.hub_base.rstrip("/")
        check_url(endpoint)
        hub_folder = find_hub_folder(parsed, endpoint, settings.download)
        folder = PurePosixPath(parsed.folder or parsed.repository).name
        version, license = hub_folder.commit, hub_folder.license
        return _Source(hub_folder.files, True, folder, settings.backbone, None, version, license, parsed.centred)
    url = f"{settings.openai_base.rstrip('/')}/{parsed.path}"
    file = RemoteFile(url, f"{parsed.layer}.pt")
    backbone = settings.backbone or OPENAI_BACKBONE
    return _Source((file,), False, parsed.location, backbone, parsed.site, None, OPENAI_LICENSE)


def _fetch(file: RemoteFile, folder: Path, settings: PullSettings, progress: Progress | None) -> Fetched:
    """Fetches a file, unless an earlier call fetched it and it has not changed since."""
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
        pass  # absent or incomplete: it is fetched again
    fetched = download(file, folder, settings.download, progress)
    note.write_text(json.dumps(_record(fetched)))
    return fetched


def _record(file: Fetched) -> dict[str, Any]:
    return {"url": file.url, "bytes": file.size, "sha256": file.sha256, "verified": list(file.verified)}
