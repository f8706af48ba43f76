"""Edit presets that cannot work stop the start of a replica."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.edits.files import EditFileError
from service.replica import ReplicaSettings, ServiceRuntime
from tests.builders import byte_tokenizer, small_backbone
from tests.service.conftest import served_dictionaries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, edits: [{feature: 'mid:999', set: 1}]}", r"preset 'a': edits\[0\]\.feature: is 999, outside"),
        ("- {name: a, edits: [{feature: 'plain:1', ablate: mean}]}", "ablate_mean needs statistics"),
        ("- {name: a, edits: [{feature: 'mid:1', set: 1}, {feature: 'mid:1', add: 1}]}", "both write feature 1"),
        ("- {name: a, edit: []}", "no such key"),
    ],
)
def test_presets_that_cannot_work_stop_the_start(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "edits.yaml"
    file.write_text(text)
    with pytest.raises(EditFileError, match=message):
        ServiceRuntime(small_backbone(), served_dictionaries(), ReplicaSettings(edit_presets=str(file)))


def test_a_reference_text_that_the_model_cannot_take_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "edits.yaml"
    file.write_text("- {name: a, edits: [{feature: 'mid:1', resample: {text: 'pad [PAD]', tokens: last}}]}")
    backbone = small_backbone(tokenizer=byte_tokenizer("[PAD]"))
    with pytest.raises(EditFileError, match=r"preset 'a': .*\[PAD\].* token id 257 .*outside the model's vocabulary"):
        ServiceRuntime(backbone, served_dictionaries(), ReplicaSettings(edit_presets=str(file)))
