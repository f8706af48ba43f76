"""Finds the files of a dictionary in a Hugging Face repository, with their sizes and checksums."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sae_runtime.dictionary.pull.download import DownloadSettings, PullError, RemoteFile, get_json
from sae_runtime.dictionary.pull.names import HubName

# Files of SAELens, sparsify, dictionary_learning and this project. No other file of a repository is fetched.
WEIGHTS = ("sae_weights.safetensors", "sae.safetensors", "ae.pt", "weights.safetensors")
_DESCRIBING = ("cfg.json", "config.json", "sparsity.safetensors", "dictionary.json", "stats.safetensors", "CARD.md")
_SHOWN = 20


@dataclass(frozen=True)
class HubFolder:
    """The files of one dictionary."""

    commit: str
    """The revision's commit."""
    license: str | None
    """The licence in the repository's card."""
    files: tuple[RemoteFile, ...]
    gated: bool


def find_hub_folder(name: HubName, endpoint: str, settings: DownloadSettings) -> HubFolder:
    """Looks up a folder.

    Raises:
        PullError: no such repository, revision or folder, or no dictionary in it; lists the folders that have one.
    """
    quoted = urllib.parse.quote(name.repository)
    revision = urllib.parse.quote(name.revision, safe="")
    info = _object(get_json(f"{endpoint}/api/models/{quoted}/revision/{revision}", settings), name.repository)
    commit = info.get("sha")
    if not isinstance(commit, str) or not commit.isalnum():
        raise PullError(f"{name.repository}: the hub names no commit of revision {name.revision!r}")
    tree = f"{endpoint}/api/models/{quoted}/tree/{commit}"
    folder = urllib.parse.quote(name.folder)
    entries = _entries(get_json(f"{tree}/{folder}" if folder else tree, settings), name.repository)
    in_folder = {PurePosixPath(entry["path"]).name: entry for entry in entries if entry.get("type") == "file"}
    if not any(weights in in_folder for weights in WEIGHTS):
        raise PullError(_elsewhere(name, _entries(get_json(f"{tree}?recursive=true", settings), name.repository)))
    files = tuple(
        _remote(f"{endpoint}/{quoted}/resolve/{commit}/{urllib.parse.quote(entry['path'])}", file, entry)
        for file, entry in sorted(in_folder.items())
        if file in WEIGHTS or file in _DESCRIBING
    )
    return HubFolder(commit, _license(info), files, bool(info.get("gated")))


def _remote(url: str, name: str, entry: dict[str, Any]) -> RemoteFile:
    """Large files have a sha256, the others git's sha1."""
    size = entry.get("size")
    lfs = entry.get("lfs")
    if isinstance(lfs, dict):
        return RemoteFile(url, name, size=lfs.get("size", size), sha256=lfs.get("oid"))
    return RemoteFile(url, name, size=size, git_sha1=entry.get("oid"))


def _license(info: dict[str, Any]) -> str | None:
    card = info.get("cardData")
    if isinstance(card, dict) and isinstance(card.get("license"), str):
        return str(card["license"])
    tags = info.get("tags")
    licenses = [str(tag) for tag in tags if str(tag).startswith("license:")] if isinstance(tags, list) else []
    return licenses[0].removeprefix("license:") if licenses else None


def _elsewhere(name: HubName, entries: list[dict[str, Any]]) -> str:
    paths = [PurePosixPath(entry["path"]) for entry in entries if entry.get("type") == "file"]
    folders = sorted({str(path.parent) for path in paths if path.name in WEIGHTS})
    inside = [folder for folder in folders if not name.folder or folder.startswith(f"{name.folder}/")] or folders
    where = f"{name.repository}/{name.folder}".rstrip("/")
    if not inside:
        return f"{where} holds no dictionary: none of {', '.join(WEIGHTS)} is in the repository"
    shown = ", ".join(inside[:_SHOWN]) + (f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else "")
    return f"{where} is not a dictionary itself; folders of the repository that hold one: {shown}"


def _object(reply: Any, what: str) -> dict[str, Any]:
    if not isinstance(reply, dict):
        raise PullError(f"{what}: the hub answered {type(reply).__name__}, expected an object")
    return reply


def _entries(reply: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(reply, list) or not all(isinstance(e, dict) and isinstance(e.get("path"), str) for e in reply):
        raise PullError(f"{what}: the hub's list of files does not have the expected form")
    return list(reply)
