"""Where tokens come from, against the tokenizer and against the rows of training."""

from itertools import chain
from typing import Any

import numpy as np
import pytest

from sae_runtime import Backbone
from sae_runtime.catalogue.settings import CatalogueSettings
from sae_runtime.catalogue.text import Text, TextPass, TextReader
from sae_runtime.data.documents import Document
from sae_runtime.data.rows import CutterState, RowCutter, encode_texts


def read(backbone: Backbone, settings: CatalogueSettings) -> tuple[Text, list[TextPass]]:
    text = Text(np.uint16)
    return text, list(TextReader.open(backbone, settings).passes(text))


@pytest.mark.parametrize("rows", ["documents", "packed"])
@pytest.mark.parametrize("prepend", [False, True])
def test_every_token_knows_where_it_comes_from(
    tiny_backbone: Backbone, settings: CatalogueSettings, records: list[dict[str, Any]], rows: str, prepend: bool
) -> None:
    settings = settings.model_copy(update={"rows": rows, "prepend_end_of_text": prepend})
    text, passes = read(tiny_backbone, settings)
    pieces = [tiny_backbone.token_bytes(i) for i in range(tiny_backbone.vocab_size)]
    tokens = np.arange(text.n_tokens)
    characters = text.characters(tokens, pieces)
    documents, positions = text.document(tokens), text.position_in_document(tokens)
    for token, id in enumerate(text.ids.tolist()):
        tokenized = tiny_backbone.encode_text(records[documents[token]]["text"])
        assert tokenized.ids[positions[token]] == id
        assert tokenized.char_starts[positions[token]] == characters[token]
    assert [text.documents[d].kind for d in documents] == [records[d]["kind"] for d in documents]
    assert [text.documents[d].record for d in documents] == documents.tolist()
    for passed in passes:
        here = passed.first + np.arange(len(passed))
        assert (passed.document == text.document(here)).all()
        assert (passed.position == text.position(here)).all()
        begin, end = text.stretch(here)
        assert (passed.begin + passed.first == begin).all()
        assert (passed.end + passed.first == end).all()
        ids, place = np.array(list(chain(*passed.rows))), np.concatenate([np.arange(len(row)) for row in passed.rows])
        assert (ids[passed.is_text] == passed.ids).all()
        assert (place[passed.is_text] == passed.position).all()
        assert (ids[~passed.is_text] == 0).all()  # end-of-text
        assert passed.document_began == np.flatnonzero(documents == passed.document[0])[0]


@pytest.mark.parametrize("rows", ["documents", "packed"])
@pytest.mark.parametrize("prepend", [False, True])
def test_the_rows_are_those_of_training(
    tiny_backbone: Backbone, settings: CatalogueSettings, records: list[dict[str, Any]], rows: Any, prepend: bool
) -> None:
    settings = settings.model_copy(update={"rows": rows, "prepend_end_of_text": prepend})
    _, passes = read(tiny_backbone, settings)
    encode, end_of_text = encode_texts(tiny_backbone)
    cutter = RowCutter(encode, end_of_text, 32, rows, prepend)
    expected = list(cutter.cut([Document(record["text"], "") for record in records], CutterState()))
    found = [row for passed in passes for row in passed.rows]
    assert found[: len(expected)] == expected
    assert len(found) <= len(expected) + (rows == "packed")  # training drops a last row that is not full
    assert all(sum(map(len, passed.rows)) <= settings.tokens_per_pass for passed in passes)


def test_it_stops_when_there_is_enough(tiny_backbone: Backbone, settings: CatalogueSettings) -> None:
    text, _ = read(tiny_backbone, settings.model_copy(update={"tokens": 100}))
    assert 100 <= text.n_tokens < 100 + 32
