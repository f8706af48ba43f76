"""Edits in YAML files: what they say, and that nothing unknown passes; the examples of protos/README.md."""

import re
from pathlib import Path
from typing import Any

import pytest

from sae_runtime.edits import AfterText, AllOf, Condition, Edit, Reference
from service import client
from service.edits.files import EditFileError, Preset, read_edits, read_presets
from service.edits.messages import edit_message

README = Path(__file__).parents[3] / "protos" / "README.md"


def written(folder: Path, text: str) -> Path:
    file = folder / "edits.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_list_of_edits(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        - {feature: "mid:3", set: 2, unit: max, positions: generated}
        - {dictionary: mid, feature: 4, clamp: {maximum: 0.5}, positions: [0, 7]}
        - {feature: "mid:5", ablate: mean, where: "3 > 0.5 and early:1 <= 0"}
        - feature: mid:6
          resample: {text: "A reference", tokens: mean}
          positions: {after: "Once upon", occurrence: each, max_tokens: 2}
        - {feature: "mid:7", resample: {token_ids: [1, 2]}}
        - {dictionary: late, replace: true, positions: last}
        - {feature: "mid:8", scale: 0}
        - {feature: "mid:9", add: -1.5}
        """,
    )
    both = AllOf((Condition(3, 0.5), Condition(1, 0.0, "early", "at_most")))
    assert read_edits(file) == (
        Edit("mid", 3, "set", 2.0, unit="max", positions="generated"),
        Edit("mid", 4, "clamp", maximum=0.5, positions=(0, 7)),
        Edit("mid", 5, "ablate_mean", condition=both),
        Edit(
            "mid",
            6,
            "resample",
            reference=Reference("A reference", "mean"),
            positions=AfterText("Once upon", "each", 2),
        ),
        Edit("mid", 7, "resample", reference=Reference((1, 2))),
        Edit("late", 0, "replace", positions="last"),
        Edit("mid", 8, "scale", 0.0),
        Edit("mid", 9, "add", -1.5),
    )


def test_named_sets(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        - name: calm
          description: Less of it.
          edits: [{feature: "mid:1", ablate: zero}]
        - {name: loud, edits: [{feature: "mid:1", set: 9}]}
        """,
    )
    calm = Preset("calm", "Less of it.", (Edit("mid", 1, "ablate_zero"),))
    assert read_presets(file) == (calm, Preset("loud", "", (Edit("mid", 1, "set", 9.0),)))
    with pytest.raises(EditFileError, match=r"several sets of edits \(calm, loud\); write FILE:NAME"):
        read_edits(file)
    assert read_edits(written(tmp_path, "[{name: calm, edits: [{feature: 'mid:1', ablate: zero}]}]")) == calm.edits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a list, not nothing"),
        ("a: b", "must hold a list, not dict"),
        ("[", "cannot read edits from"),
        ("[3]", r"\[0\]: Input should be a valid dictionary"),
        ("[{feature: 'd:1', set: 1, strength: 2}]", r"\[0\]\.strength: no such key"),
        ("[{feature: 'd:1', clamp: {low: 2}}]", r"\[0\]\.clamp\.low: no such key"),
        ("[{feature: 'd:1', set: 1, positions: {before: x}}]", r"\[0\]\.positions: no such key"),
        ("[{feature: 'd:1', set: 1, positions: first}]", r"\[0\]\.positions: Expected all, prompt"),
        ("[{feature: 'd:1'}]", r"\[0\]: expected one operation of set, .*, found none"),
        ("[{feature: 'd:1', set: 1, add: 2}]", "found set and add"),
        ("[{feature: 1, set: 1}]", "dictionary is missing"),
        ("[{dictionary: e, feature: 'd:1', set: 1}]", "the feature names one, too"),
        ("[{dictionary: d, set: 1}]", "feature is missing"),
        ("[{feature: 'd:x', set: 1}]", "expected a number or DICTIONARY:NUMBER"),
        ("[{feature: 'd:1', replace: true}]", "feature does not belong to replace"),
        ("[{feature: 'd:1', set: .nan}]", r"\[0\]\.value: is nan"),
        ("[{feature: 'd:1', set: much}]", r"\[0\]\.set: .*found 'much'"),
        ("[{feature: 'd:1', set: 1, positions: []}]", r"\[0\]\.positions: is empty"),
        ("[{feature: 'd:1', set: 1, positions: {after: x, occurrence: each}}]", "but without max_tokens"),
        ("[{feature: 'd:1', set: 1, where: '3 >'}]", "'3 >' is no condition"),
        ("[{feature: 'd:1', resample: {text: a, token_ids: [1]}}]", "expected either text or token_ids"),
        ("[{feature: 'd:1', resample: {tokens: last}}]", "expected either text or token_ids"),
        ("[{feature: 'd:1', ablate: half}]", r"\[0\]\.ablate"),
        ("[{name: a, edits: []}]", r"\[0\]\.edits"),
        ("[{name: '', edits: [{feature: 'd:1', set: 1}]}]", r"\[0\]\.name"),
        ("[{name: a, edits: [{feature: 'd:1', set: 1, x: 2}]}]", r"\[0\]\.edits\[0\]\.x: no such key"),
        ("[{name: a, edits: [{feature: 'd:1', set: 1, unit: x}]}]", r"\[0\]\.edits\[0\]\.unit"),
        ("[{name: a, note: x, edits: [{feature: 'd:1', set: 1}]}]", r"\[0\]\.note: no such key"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(EditFileError, match=message) as error:
        read_edits(written(tmp_path, text))
    assert "edits.yaml" in str(error.value)


def test_a_name_twice_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    one = "{name: a, edits: [{feature: 'd:1', set: 1}]}"
    with pytest.raises(EditFileError, match=r"\[1\]\.name: 'a' is the name of two presets"):
        read_presets(written(tmp_path, f"[{one}, {one}]"))
    with pytest.raises(EditFileError, match="cannot read edits from"):
        read_presets(tmp_path / "none.yaml")


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_examples_of_the_documentation_are_as_they_should_be(tmp_path: Path) -> None:
    """The YAML presets are valid, and the Python example makes the same edits."""
    (yaml_text,) = examples("yaml")
    presets = read_presets(written(tmp_path, yaml_text))
    (python_text,) = examples("python")
    names: dict[str, Any] = {name: getattr(client, name) for name in client.__all__}
    exec(python_text, names)
    assert tuple(names["edits"]) == presets[0].edits
    for preset in presets:
        for edit in preset.edits:
            edit.validate()
            edit_message(edit)


def test_the_table_of_the_documentation_names_every_key() -> None:
    from service.edits.files import _Edit  # the model is the list of keys

    text = README.read_text(encoding="utf-8")
    assert [key for key in _Edit.model_fields if f"`{key}" not in text] == []
