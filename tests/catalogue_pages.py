"""Small pages of a catalogue, for tests of what writes, reads and shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_runtime.catalogue.records import (
    CatalogueInfo,
    Context,
    FeaturePage,
    FeatureSummary,
    Flag,
    Label,
    Neighbor,
    Place,
    TokenFigure,
)
from sae_runtime.catalogue.write import write_catalogue

FINGERPRINT = "ab" * 32


def catalogue_info(n_latents: int = 96, **changes: Any) -> CatalogueInfo:
    facts: dict[str, Any] = {
        "schema_version": 1,
        "dictionary": "mid",
        "fingerprint": FINGERPRINT,
        "backbone": "small",
        "backbone_fingerprint": "cd" * 32,
        "n_latents": n_latents,
        "n_tokens": 1_000_000,
        "n_documents": 2_000,
        "sources": ("prose.jsonl", "code.jsonl"),
        "seed": 7,
        "created": "2026-11-30T12:00:00+00:00",
        "code_version": "0.1.0",
        "settings": {"window": 7},
        "figures": {"single_token": 0.25},
    }
    return CatalogueInfo(**facts | changes)


def context(
    text: str, activations: Sequence[float], *, kind: Any = "strongest", quantile: int = -1, record: int = 3
) -> Context:
    """A context whose tokens are the words of a text, each with the space before it."""
    words = text.split(" ")
    tokens = tuple((" " * (i > 0) + word).encode() for i, word in enumerate(words))
    peak = max(range(len(tokens)), key=lambda i: activations[i])
    place = Place("prose.jsonl", record, position=peak, character=text.find(words[peak]), text_kind="prose")
    return Context(kind, quantile, tokens, tuple(activations), peak, place)


def figures(*pieces: str, count: int = 0) -> tuple[TokenFigure, ...]:
    """Tokens of a list, the first with the largest value."""
    return tuple(TokenFigure(i + 40, piece.encode(), 2.0 - i / 4, count) for i, piece in enumerate(pieces))


def page(
    feature: int,
    label: str = "",
    *,
    f1: float | None = None,
    rate: float = 0.01,
    flags: tuple[Flag, ...] = (),
    active: Sequence[str] = (" cat",),
    promoted: Sequence[str] = (" sat",),
    contexts: Sequence[Context] = (),
    **changes: Any,
) -> FeaturePage:
    """A page with a rule's label, if one is given. All 100 firings are shared by its active tokens."""
    labels = (Label(label, "rule", f1, 0.9, 0.7, 60, 60, {"kind": "tokens", "tokens": [1]}),) if label else ()
    active_tokens = figures(*active, count=100 // max(len(active), 1))
    values: dict[str, Any] = {
        "summary": FeatureSummary(
            feature, label, "rule" if label else "", f1, rate, 2.5, flags, tuple(t.piece for t in active_tokens)
        ),
        "labels": labels,
        "document_rate": 0.125,
        "n_firings": 100,
        "mean_active": 1.25,
        "token_r2": 0.5,
        "position_correlation": -0.125,
        "histogram": (50, 30, 15, 5),
        "rate_by_position": (0.5, 0.25, 0.125),
        "rate_by_kind": {"code": 0.5, "prose": 0.25},
        "rate_by_language": {},
        "active_tokens": active_tokens,
        "promoted": figures(*promoted),
        "suppressed": figures(" dog"),
        "neighbors": (Neighbor("mid", (feature + 1) % 96, 0.75, "decoder"), Neighbor("early", 5, 0.5, "together")),
        "ablation_kl": 0.25,
        "output_score": None,
        "contexts": tuple(contexts),
    }
    return FeaturePage(**values | changes)


def pages() -> list[FeaturePage]:
    """Of the first features of a dictionary of 96: what searches and lists tell apart."""
    spanish = [context("la casa de mi madre está", [0, 0, 2.5, 0.5, 0, 1]), context("de", [2.0])]
    return [
        page(0, "any token of Spanish text", f1=0.9, rate=0.02, active=[" de", " la"], contexts=spanish),
        page(1, 'token "="', f1=0.95, rate=0.01, active=[" =", "="], promoted=[" 1"]),
        page(2, "", rate=0.3, flags=("dense", "positional"), active=[",", " ="]),
        page(3, "Python keywords", f1=0.6, rate=0.005, active=["def", " return"], promoted=[" =", "{"]),
        page(4, "", rate=0.0, flags=("dead",), active=[], promoted=[], token_r2=None, n_firings=0),
    ]


def write_pages(folder: Path, **info: Any) -> Path:
    """`features.sqlite` of `pages()` in a folder."""
    path = folder / "features.sqlite"
    write_catalogue(path, catalogue_info(**info), pages())
    return path
