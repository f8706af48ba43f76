"""Labels of a model, whose part a small local server plays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sae_runtime.catalogue.chat_endpoint import ChatEndpoint
from sae_runtime.catalogue.explainer import (
    EXPLAIN_PROMPT,
    MAX_FAILURES,
    MAX_TESTED,
    PROMPT_NAME,
    Explainer,
    ExplainerError,
    ToExplain,
    explain_request,
)
from sae_runtime.catalogue.records import Context, Place
from tests.sae_runtime.catalogue.chat_server import Reply, chat_server, completion
from tests.sae_runtime.catalogue.vocabulary import VOCABULARY, examples

PLACE = Place("a.txt", 0, 0, 0, "code")
CONTEXTS = [
    Context("strongest", -1, (b" The", b" king\n", b"\xc3"), (0.0, 4.0, 1.9), 1, PLACE),
    Context("strongest", -1, (b"a",), (2.0,), 0, PLACE),
]
ROWS = [[" The", " king"], [" The", "."], [" The", "12"]]
HELD_OUT = examples(ROWS * 12, active=[1, 0, 0] * 12, hard=[0, 0, 1] * 12)
LATENT = ToExplain(7, CONTEXTS, HELD_OUT)


def sees(pattern: str) -> Callable[[dict[str, Any]], Reply]:
    """A model that explains with the pattern, and finds the excerpts that match it."""

    def answer(body: dict[str, Any]) -> Reply:
        system, user = (message["content"] for message in body["messages"])
        if system == EXPLAIN_PROMPT:
            return completion(f' "the word\n{pattern}" ')
        assert f"the word {pattern}" in system
        active = [number for number, line in enumerate(user.splitlines(), 1) if re.search(pattern, line)]
        return completion(f"```json\n{json.dumps({'active': active})}\n```")

    return answer


def explainer(url: str, **settings: Any) -> Explainer:
    return Explainer(ChatEndpoint(url, "tiny", sleep=lambda seconds: None, **settings), VOCABULARY)


def test_a_label_with_the_figures_of_its_test() -> None:
    with chat_server(sees("king>>")) as server:
        label = explainer(server.url).label(LATENT)
    assert (label.text, label.source, label.author) == ("the word king>>", "tiny", PROMPT_NAME)
    assert (label.f1, label.precision, label.recall) == (1, 1, 1)
    assert (label.n_positive, label.n_negative) == (MAX_TESTED // 2, MAX_TESTED // 2)
    assert label.created.endswith("+00:00")
    assert "<< king>>" in server.bodies[1]["messages"][1]["content"]


def test_an_explanation_that_is_true_of_too_much_scores_less() -> None:
    with chat_server(sees("The")) as server:
        label = explainer(server.url).label(LATENT)
    assert label.f1 == pytest.approx(2 / 3)  # "any token"


def test_activations_are_shown_from_0_to_10_and_a_token_stays_on_its_line() -> None:
    assert explain_request(CONTEXTS).splitlines() == [
        *("<start>", " The\t0", " king\\n\t10", "\ufffd\t5", "<end>"),
        *("<start>", "a\t5", "<end>"),
    ]


@pytest.mark.parametrize(
    ("explanation", "verdict", "message"),
    [
        ("", "", "the explanation is empty"),
        ("a" * 501, "", "the explanation has 501 characters"),
        ("red \x1b[31m text", "", r"control character U\+001B"),
        ("fine", "yes", "the answer is not"),
        ("fine", '{"active": [0]}', "the answer is not"),
        ("fine", '{"active": [21]}', "the answer is not"),
        ("fine", '{"active": [true]}', "the answer is not"),
        ("fine", '{"active": "1"}', "the answer is not"),
        ("fine", "[" * 100_000, "the answer is not"),
        ("{explanation!r:>999999999}", "no", "the answer is not"),  # it is text, not a format
    ],
)
def test_hostile_answers_give_an_error_that_names_the_latent(explanation: str, verdict: str, message: str) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        return completion(explanation if body["messages"][0]["content"] == EXPLAIN_PROMPT else verdict)

    with chat_server(answer) as server, pytest.raises(ExplainerError, match=f"feature 7: .*{message}"):
        explainer(server.url).label(LATENT)


def test_html_stays_text() -> None:
    text = "<script>alert(1)</script> {0} %s"

    def answer(body: dict[str, Any]) -> Reply:
        return completion(text if body["messages"][0]["content"] == EXPLAIN_PROMPT else '{"active": []}')

    with chat_server(answer) as server:
        label = explainer(server.url).label(LATENT)
    assert (label.text, label.f1) == (text, 0)


def test_the_build_goes_on_after_a_latent_without_a_usable_answer() -> None:
    well = sees("king>>")
    calls = iter(range(99))

    def answer(body: dict[str, Any]) -> Reply:
        return completion("") if next(calls) == 2 else well(body)  # the explanation of the second latent

    errors: list[ExplainerError] = []
    latents = [ToExplain(i, CONTEXTS, HELD_OUT) for i in (3, 4, 5)]
    with chat_server(answer) as server:
        labels = dict(explainer(server.url).labels(latents, errors.append))
    assert list(labels) == [3, 5]
    assert [str(error) for error in errors] == ["feature 4: the explanation is empty"]


def test_an_endpoint_that_never_answers_well_is_given_up() -> None:
    errors: list[ExplainerError] = []
    with chat_server(lambda body: (401, {}, b"")) as server:
        latents = [ToExplain(i, CONTEXTS, HELD_OUT) for i in range(50)]
        assert not dict(explainer(server.url).labels(latents, errors.append))
    assert len(errors) == len(server.bodies) == MAX_FAILURES


def test_the_budget_ends_the_labels_and_is_no_error() -> None:
    errors: list[ExplainerError] = []
    with chat_server(sees("king>>")) as server:
        latents = [ToExplain(i, CONTEXTS, HELD_OUT) for i in range(9)]
        labels = dict(explainer(server.url, max_requests=5).labels(latents, errors.append))
    assert list(labels) == [0, 1]
    assert not errors
    assert len(server.bodies) == 4


def test_a_latent_without_contexts_or_silent_examples() -> None:
    with chat_server(sees("king>>")) as server:
        for latent in (ToExplain(7, [], HELD_OUT), ToExplain(7, CONTEXTS, HELD_OUT[np.flatnonzero(HELD_OUT.active)])):
            with pytest.raises(ExplainerError, match="feature 7: too few contexts"):
                explainer(server.url).label(latent)
    assert not server.bodies


@pytest.mark.parametrize("model", ["rule", "person", "", "a" * 101, "a\nb"])
def test_names_of_models_that_would_be_taken_for_another_source(model: str) -> None:
    with pytest.raises(ValueError, match="model"):
        Explainer(ChatEndpoint("http://127.0.0.1:1/v1", model), VOCABULARY)
