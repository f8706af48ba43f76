"""Labels as CSV and JSON files in the shape of Neuronpedia's explanation export.

A row or object is one label. Neuronpedia's names are modelId, layer (the dictionary), index, description, typeName (how
it was made) and explanationModelName (the source); files of either side can be read by the other. The further names
keep what a label says beyond that. JSON is a list, or one object a line, as in Neuronpedia's exports of whole sets.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from sae_runtime.catalogue.label_store import MAX_NAME_CHARACTERS, checked_text
from sae_runtime.catalogue.records import Label

LabelFormat = Literal["csv", "json"]
LabelOf = tuple[int, Label]
"""A feature and one of its labels."""

COLUMNS = (
    *("modelId", "layer", "index", "description", "explanationModelName", "typeName"),
    *("f1", "precision", "recall", "nPositive", "nNegative", "createdAt", "predicate"),
)
DEFAULT_SOURCE = "person"
"""Source of an imported label that does not say which model wrote it."""
MAX_FEATURE = 2**31 - 1


def write_labels(labels: Iterable[LabelOf], format: LabelFormat, *, backbone: str, dictionary: str) -> str:
    """The text of a file of labels, in the order given."""
    rows = [_row(feature, label, backbone, dictionary) for feature, label in labels]
    if format == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        predicate = row["predicate"]
        writer.writerow(row | {"predicate": json.dumps(predicate, ensure_ascii=False) if predicate else ""})
    return text.getvalue()


def read_labels(text: str, format: LabelFormat, *, dictionary: str | None = None) -> list[LabelOf]:
    """The labels of a file that `write_labels` or Neuronpedia wrote; "null" for what is not known counts as missing.

    Args:
        text: the file's text.
        format: csv, or json: a list, {"explanations": a list}, or one object a line.
        dictionary: if given, labels whose `layer` is another one are left out.

    Raises:
        ValueError: the text has another form, or a label is not valid; names the row, counted from 1.
    """
    labels = []
    for number, row in enumerate(_csv_rows(text) if format == "csv" else _json_rows(text), 1):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, found {type(row).__name__}")
            if dictionary is None or row.get("layer") in (None, "", dictionary):
                labels.append(_label(row))
        except ValueError as error:
            raise ValueError(f"label {number}: {error}") from error
    return labels


def _row(feature: int, label: Label, backbone: str, dictionary: str) -> dict[str, Any]:
    return {
        "modelId": backbone,
        "layer": dictionary,
        "index": str(feature),
        "description": label.text,
        "explanationModelName": label.source,
        "typeName": label.author,
        "f1": label.f1,
        "precision": label.precision,
        "recall": label.recall,
        "nPositive": label.n_positive,
        "nNegative": label.n_negative,
        "createdAt": label.created,
        "predicate": dict(label.predicate),
    }


def _label(row: dict[str, Any]) -> LabelOf:
    feature = _number(row, "index")
    if feature is None or feature != int(feature) or not 0 <= feature <= MAX_FEATURE:
        raise ValueError(f"`index` is {row.get('index')!r}, expected the number of a feature")
    text = row.get("description")
    if not isinstance(text, str):
        raise ValueError(f"`description` is {text!r}, expected text")
    predicate = row.get("predicate") or {}
    if isinstance(predicate, str):
        try:
            predicate = json.loads(predicate)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`predicate` is not JSON: {error}") from error
    if not isinstance(predicate, dict):
        raise ValueError(f"`predicate` is {type(predicate).__name__}, expected an object")
    counts = [_number(row, name) or 0.0 for name in ("nPositive", "nNegative")]
    if any(count < 0 or count != int(count) for count in counts):
        raise ValueError("`nPositive` and `nNegative` must be whole numbers from 0")
    return int(feature), Label(
        text=checked_text(text.replace("\r\n", "\n").replace("\n", " "), "`description`"),
        source=_name(row, "explanationModelName") or DEFAULT_SOURCE,
        f1=_share(row, "f1"),
        precision=_share(row, "precision"),
        recall=_share(row, "recall"),
        n_positive=int(counts[0]),
        n_negative=int(counts[1]),
        predicate=predicate,
        author=_name(row, "typeName"),
        created=_name(row, "createdAt"),
    )


def _name(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise ValueError(f"`{column}` is {value!r}, expected text")
    return checked_text(value, f"`{column}`", MAX_NAME_CHARACTERS)


def _number(row: dict[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`{column}` is {value!r}, expected a number")
    return number


def _share(row: dict[str, Any], column: str) -> float | None:
    number = _number(row, column)
    if number is not None and not 0 <= number <= 1:
        raise ValueError(f"`{column}` is {number}, expected a number from 0 to 1")
    return number


def _csv_rows(text: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        missing = {"index", "description"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"the first line of the file lacks the columns {', '.join(sorted(missing))}")
        yield from reader
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of the file is not CSV: {error}") from error


def _json_rows(text: str) -> list[Any]:
    text = text.removeprefix("\ufeff")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:  # one object a line
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            raise ValueError(f"the file is not JSON: {error}") from error
    if isinstance(data, dict):
        data = data.get("explanations", [data])
    if not isinstance(data, list):
        raise ValueError(f"expected a list of labels, found {type(data).__name__}")
    return data
