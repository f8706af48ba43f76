"""JSON objects in the encodings that JSON may have, and what is no JSON object."""

from __future__ import annotations

import codecs

import pytest

from sae_runtime.dictionary.json_object import parse_object


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_encoding_of_json_is_read(encoding: str) -> None:
    assert parse_object('{"naïve": [1, 2.5, "Ω"]}'.encode(encoding)) == {"naïve": [1, 2.5, "Ω"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (codecs.BOM_UTF8, "Expecting value"),
        (b'{"k": ', "Expecting value"),
        (b"[]", "found a list, expected an object"),
        (b"3", "found a int, expected an object"),
        ("{'naïve': 1}".encode("latin-1"), "decode"),
        (b'{"k": 1, "k": 2}', "the key 'k' is there twice"),
        (b'{"a": {"k": 1, "b": 0, "k": 1}}', "the key 'k' is there twice"),
        (b'{"k": NaN}', "NaN is not JSON"),
        (b'{"k": -Infinity}', "-Infinity is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"k": ' + b"9" * 5000 + b"}", "digits"),
    ],
    ids=["empty", "mark", "cut", "list", "number", "latin-1", "twice", "inner", "nan", "infinity", "deep", "long"],
)
def test_what_is_no_object_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_object(content)
