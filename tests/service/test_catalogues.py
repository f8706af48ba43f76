"""Where labels of a dictionary are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sae_runtime import load_dictionary
from service.catalogues import labels_file
from tests.service.conftest import served_dictionaries


def test_where_labels_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    users = tmp_path / "data" / "saeserve" / "labels.sqlite"
    mid = served_dictionaries()["mid"]
    beside = replace(mid, folder=tmp_path)
    assert labels_file(beside, "") == tmp_path / "labels.sqlite"
    assert labels_file(beside, str(tmp_path / "shared")) == tmp_path / "shared" / "labels.sqlite"
    assert labels_file(mid, "") == users  # of no folder
    assert labels_file(load_dictionary("resid-mid"), "") == users  # of the package, which an update replaces
    assert labels_file(replace(mid, folder=tmp_path / "gone"), "") == users
    monkeypatch.delenv("XDG_DATA_HOME")
    assert labels_file(mid, "") == Path.home() / ".local" / "share" / "saeserve" / "labels.sqlite"
