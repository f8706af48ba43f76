"""A server with a dictionary that has a catalogue ("mid"), and others that have none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from sae_runtime import Dictionary
from service.replica import ReplicaSettings
from tests.catalogue_pages import write_pages
from tests.service.conftest import LIMITS, Served, serve, served_dictionaries


def with_catalogue(folder: Path) -> dict[str, Dictionary]:
    dictionaries = served_dictionaries()
    folder.mkdir()
    write_pages(folder, fingerprint=dictionaries["mid"].fingerprint)
    return dictionaries | {"mid": replace(dictionaries["mid"], folder=folder)}


@pytest.fixture
async def catalogued(tmp_path: Path) -> AsyncIterator[Served]:
    settings = ReplicaSettings(limits=LIMITS, labels_dir=str(tmp_path / "labels"))
    async for server in serve(settings, dictionaries=with_catalogue(tmp_path / "mid")):
        yield server
