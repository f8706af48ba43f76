"""Labels in files: they come back as they were, and Neuronpedia's own files are read."""

import csv
import io
import json
from typing import Any

import pytest

from sae_runtime.catalogue.label_files import LabelFormat, read_labels, write_labels
from sae_runtime.catalogue.records import Label

LABELS = [
    (3, Label("Spanish text", "person", author="Ana", created="2026-01-01T00:00:00+00:00")),
    (
        3,
        Label('token "=", or <b>%s</b> {0}', "rule", 0.75, 0.8, 0.7, 34, 96, {"kind": "any"}),
    ),
    (40_000, Label("=HYPERLINK(1); 'x', \"y\"", "gpt-4o-mini", 0.0, author="oai_token-act-pair")),
]
FORMATS: list[LabelFormat] = ["csv", "json"]


@pytest.mark.parametrize("format", FORMATS)
def test_labels_come_back_as_they_were(format: LabelFormat) -> None:
    text = write_labels(LABELS, format, backbone="builtin", dictionary="resid-mid")
    assert read_labels(text, format) == LABELS
    assert read_labels("\ufeff" + text.replace("\n", "\r\n"), format) == LABELS  # as an editor may save it
    assert read_labels(write_labels([], format, backbone="builtin", dictionary="resid-mid"), format) == []


def test_names_are_those_of_neuronpedia() -> None:
    text = write_labels(LABELS[2:], "json", backbone="builtin", dictionary="resid-mid")
    expected = {
        "modelId": "builtin",
        "layer": "resid-mid",
        "index": "40000",
        "description": "=HYPERLINK(1); 'x', \"y\"",
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
    }
    assert expected.items() <= json.loads(text)[0].items()
    row = next(csv.DictReader(io.StringIO(write_labels(LABELS[2:], "csv", backbone="builtin", dictionary="resid-mid"))))
    assert expected.items() <= row.items()


NEURONPEDIA: dict[str, Any] = {
    "modelId": "gpt2-small",
    "layer": "6-res-jb",
    "index": "650",
    "description": " references to\ncomputers ",
    "explanationModelName": "gpt-4o-mini",
    "typeName": "oai_token-act-pair",
    "embedding": None,
}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([NEURONPEDIA]),
        json.dumps({"explanations": [NEURONPEDIA]}, indent=1),
        json.dumps(NEURONPEDIA),
        json.dumps(NEURONPEDIA) + "\n\n",
    ],
)
def test_explanations_of_neuronpedia(text: str) -> None:
    label = Label("references to computers", "gpt-4o-mini", author="oai_token-act-pair")
    assert read_labels(text, "json") == [(650, label)]


def test_one_object_a_line() -> None:
    lines = [json.dumps(NEURONPEDIA | {"index": i}) for i in (5, "6")]
    assert [feature for feature, _ in read_labels("\n".join(lines), "json")] == [5, 6]


def test_labels_of_other_dictionaries_are_left_out_on_request() -> None:
    text = json.dumps([NEURONPEDIA, NEURONPEDIA | {"layer": "resid-mid"}, {"index": 1, "description": "a"}])
    assert [feature for feature, _ in read_labels(text, "json", dictionary="resid-mid")] == [650, 1]


def test_a_label_that_says_no_more_is_a_persons() -> None:
    assert read_labels("index,description\n7,dogs\n", "csv") == [(7, Label("dogs", "person"))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": "-1"}, "`index` is '-1'"),
        ({"index": "1.5"}, "`index` is '1.5'"),
        ({"index": None}, "`index` is None"),
        ({"index": "nan"}, "`index` is 'nan'"),
        ({"index": True}, "`index` is True"),
        ({"index": 10**400}, "`index` is 1000"),
        ({"index": 2**31}, "`index` is 2147483648"),
        ({"description": ""}, "`description` is empty"),
        ({"description": None}, "`description` is None"),
        ({"description": "a" * 501}, "has 501 characters"),
        ({"description": "a\x00b"}, r"control character U\+0000"),
        ({"explanationModelName": 3}, "`explanationModelName` is 3"),
        ({"typeName": "a\nb"}, r"control character U\+000A"),
        ({"f1": 1.5}, "`f1` is 1.5"),
        ({"recall": "many"}, "`recall` is 'many'"),
        ({"nPositive": -1}, "whole numbers"),
        ({"predicate": "{"}, "`predicate` is not JSON"),
        ({"predicate": [1]}, "`predicate` is list"),
    ],
)
def test_bad_labels_are_named(changes: dict[str, Any], message: str) -> None:
    text = json.dumps([NEURONPEDIA, NEURONPEDIA | changes])
    with pytest.raises(ValueError, match=f"label 2: .*{message}"):
        read_labels(text, "json")


@pytest.mark.parametrize(
    ("text", "format", "message"),
    [
        ("{", "json", "not JSON"),
        ("3", "json", "expected a list of labels, found int"),
        ("[3]", "json", "label 1: expected an object, found int"),
        ("[" * 100_000, "json", "not JSON"),
        ("", "csv", "lacks the columns description, index"),
        ("index;description\n1;a\n", "csv", "lacks the columns"),
        ('index,description\n1,"a\n', "csv", "not CSV"),
        ("index,description\n1," + "a" * 200_000, "csv", "not CSV"),
        ("index,description\n1\n", "csv", "label 1: `description` is None"),
    ],
)
def test_bad_files(text: str, format: LabelFormat, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(text, format)
