"""What is written is what is read, and a file appears complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sae_runtime.catalogue.read import Catalogue
from sae_runtime.catalogue.records import FeaturePage
from sae_runtime.catalogue.write import searched_texts, write_catalogue
from tests.catalogue_pages import catalogue_info, context, page, pages


def in_steps(activations: tuple[float, ...]) -> list[float]:
    """Activations as 255 steps of the largest say them, in float64 and one by one."""
    largest = max(*activations, 0.0, 0.0)
    return [round(max(a, 0.0) / largest * 255) / 255 * largest if largest else 0.0 for a in activations]


def test_every_field_of_every_page_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    written = pages()
    written[2] = replace(written[2], contexts=(context("a b c", [0, 0, 0], kind="silent"),))
    info = catalogue_info()
    write_catalogue(path, info, reversed(written))
    catalogue = Catalogue.open(path)
    assert catalogue.info == info
    for expected in written:
        found = catalogue.page(expected.summary.feature)
        assert found is not None
        assert replace(found, contexts=()) == replace(expected, contexts=())
        for ours, theirs in zip(found.contexts, expected.contexts, strict=True):
            np.testing.assert_allclose(ours.activations, in_steps(theirs.activations), rtol=1e-12)
            assert replace(ours, activations=()) == replace(theirs, activations=())
    assert catalogue.page(5) is None


def test_a_weak_activation_is_not_silent(tmp_path: Path) -> None:
    weak = context("a b c", [1e-5, 0, 1000.0])
    write_catalogue(tmp_path / "c", catalogue_info(), [page(0, contexts=[weak])])
    found = Catalogue.open(tmp_path / "c").page(0)
    assert found is not None
    assert [a > 0 for a in found.contexts[0].activations] == [True, False, True]


def test_bytes_that_are_no_text_come_back(tmp_path: Path) -> None:
    broken = replace(context("a b", [0, 1.0]), tokens=(b"\xe2\x82", b"\xac\x00\xff"))
    write_catalogue(tmp_path / "c", catalogue_info(), [page(0, contexts=[broken])])
    found = Catalogue.open(tmp_path / "c").page(0)
    assert found is not None
    assert found.contexts[0].tokens == broken.tokens


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    write_catalogue(path, catalogue_info(), pages())

    def broken() -> Iterator[FeaturePage]:
        yield page(0)
        raise RuntimeError("the text cannot be read")

    with pytest.raises(RuntimeError, match="the text cannot be read"):
        write_catalogue(path, catalogue_info(), broken())
    assert list(tmp_path.iterdir()) == [path]
    assert len(Catalogue.open(path).summaries()) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [([page(0), page(0)], "two pages of feature 0"), ([page(96)], r"feature 96, which is outside 0\.\.95")],
)
def test_pages_that_do_not_fit(tmp_path: Path, given: list[FeaturePage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_catalogue(tmp_path / "features.sqlite", catalogue_info(), given)
    assert list(tmp_path.iterdir()) == []


def test_what_a_search_looks_at() -> None:
    """Labels, active and promoted tokens, and the words around the peaks of the strongest contexts alone."""
    long = " ".join(f"w{i}" for i in range(30))
    written = page(
        0,
        "a label",
        active=[" cat", "caf\u00e9"],
        contexts=[
            context(long, [float(i == 20) for i in range(30)]),
            context("silent words", [0.0, 0.0], kind="silent"),
        ],
    )
    label, tokens, contexts = searched_texts(written)
    assert (label, tokens.split()) == ("a label", ["cat", "caf\u00e9", "sat"])
    assert contexts.split() == [f"w{i}" for i in range(12, 25)]
