"""Labels written by a language model behind any OpenAI-compatible endpoint, and tested as rules are.

Two requests a latent: the model explains the strongest contexts, in the form of Bills et al. (2023), which Neuronpedia
calls oai_token-act-pair: tokens with activations from 0 to 10. Then it is shown held-out contexts with its explanation
and says in which of them the latent is active (detection; Paulo et al. 2024). Answers are text: they are checked, and
never run, formatted or shown as anything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from sae_runtime.catalogue.chat_endpoint import ChatEndpoint, EndpointError
from sae_runtime.catalogue.detection import detection
from sae_runtime.catalogue.examples import Examples
from sae_runtime.catalogue.label_store import MAX_NAME_CHARACTERS, checked_text
from sae_runtime.catalogue.records import Context, Label
from sae_runtime.catalogue.vocabulary import Vocabulary

Integers = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]

PROMPT_NAME = "token-act-pair, detection 1"
"""Stored with every label; to be changed with the prompts."""

EXPLAIN_PROMPT = """\
We study features of a language model. A feature looks for something in a text and is active on some tokens.
Below are text excerpts on which one feature is most active: one token a line, a tab, and its activation from 0 to 10.
Summarise in one short phrase what the feature is looking for. Answer with the phrase alone."""

DETECT_PROMPT = """\
A feature of a language model is described as follows: {explanation}
Below are numbered text excerpts. For each, decide whether the feature is active on its last token, which is marked
<<so>>. Answer with JSON alone: {{"active": [numbers of the excerpts where it is active]}}"""

MAX_CONTEXTS = 10
MAX_TESTED = 20
"""Excerpts of a test: half of them active."""
MAX_FAILURES = 5
"""Latents in a row for which there was no usable answer, after which the endpoint is given up."""
_REQUESTS_PER_LATENT = 2


class ExplainerError(Exception):
    """There is no label for a latent; the message names the latent and says why."""


@dataclass(frozen=True, eq=False)
class ToExplain:
    """What the explainer is given of a latent."""

    feature: int
    contexts: Sequence[Context]
    """The strongest, best first."""
    held_out: Examples


class Explainer:
    """Writes labels until its endpoint's budget is spent."""

    def __init__(self, endpoint: ChatEndpoint, vocabulary: Vocabulary, *, seed: int = 0) -> None:
        """Raises ValueError: the model's name could be taken for a person's or a rule's labels, or is too long."""
        if endpoint.model in ("rule", "person"):
            raise ValueError(f"the model that explains cannot be called {endpoint.model!r}")
        checked_text(endpoint.model, "the model's name", MAX_NAME_CHARACTERS)
        self._endpoint, self._vocabulary, self._seed = endpoint, vocabulary, seed

    def labels(
        self, latents: Iterable[ToExplain], failed: Callable[[ExplainerError], None]
    ) -> Iterator[tuple[int, Label]]:
        """Features and their labels, for as many latents as the budget allows.

        `failed` is told of every latent without a usable answer; after MAX_FAILURES of them in a row this ends.
        """
        failures = 0
        for latent in latents:
            if self._endpoint.requests_left < _REQUESTS_PER_LATENT or failures == MAX_FAILURES:
                return
            try:
                label = self.label(latent)
            except ExplainerError as error:
                failures += 1
                failed(error)
            else:
                failures = 0
                yield latent.feature, label

    def label(self, latent: ToExplain) -> Label:
        """Explains a latent and tests the explanation.

        Raises:
            ExplainerError: the endpoint does not answer, or with something that is no explanation or no verdict; or
                there are no contexts, or no active or no silent held-out examples.
        """
        tested = latent.held_out[_tested(latent.held_out, self._seed + latent.feature)]
        if not latent.contexts or tested.active.all() or not tested.active.any():
            raise ExplainerError(f"feature {latent.feature}: too few contexts to explain it and to test that")
        try:
            text = _explanation(self._endpoint.answer(EXPLAIN_PROMPT, explain_request(latent.contexts)))
            question = DETECT_PROMPT.format(explanation=json.dumps(text, ensure_ascii=False))
            verdict = self._endpoint.answer(question, detect_request(tested, self._vocabulary))
            test = detection(_predicted(verdict, len(tested)), tested)
        except EndpointError as error:
            raise ExplainerError(f"feature {latent.feature}: {error}") from error
        return Label(
            text=text,
            source=self._endpoint.model,
            f1=test.f1,
            precision=test.precision,
            recall=test.recall,
            n_positive=test.n_positive,
            n_negative=test.n_negative,
            author=PROMPT_NAME,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def explain_request(contexts: Sequence[Context]) -> str:
    """The strongest contexts, a token and its activation (0 to 10) a line."""
    shown = contexts[:MAX_CONTEXTS]
    largest = max(max(context.activations) for context in shown)
    excerpts = []
    for context in shown:
        lines = []
        for token, activation in zip(context.tokens, context.activations, strict=True):
            piece = token.decode(errors="replace").replace("\n", "\\n").replace("\t", "\\t")
            lines.append(f"{piece}\t{round(10 * activation / largest) if largest > 0 else 0}")
        excerpts.append("<start>\n" + "\n".join(lines) + "\n<end>")
    return "\n".join(excerpts)


def detect_request(examples: Examples, vocabulary: Vocabulary) -> str:
    """The examples' text, numbered from 1, the last token marked."""
    lines = []
    for number, ids in enumerate(examples.ids.tolist(), 1):
        pieces = [vocabulary.pieces[token] for token in ids if token >= 0]
        text = b"".join([*pieces[:-1], b"<<", pieces[-1], b">>"]).decode(errors="replace")
        lines.append(f"{number}. {json.dumps(text, ensure_ascii=False)}")
    return "\n".join(lines)


def _tested(examples: Examples, seed: int) -> Integers:
    """Up to MAX_TESTED examples in random order: half active, the others silent, of which half are hard ones."""
    generator = np.random.default_rng(seed)
    half = MAX_TESTED // 2
    active = generator.permutation(np.flatnonzero(examples.active))[:half]
    hard = generator.permutation(np.flatnonzero(examples.hard))[: half // 2]
    random = generator.permutation(np.flatnonzero(~examples.active & ~examples.hard))[: half - len(hard)]
    drawn: Integers = generator.permutation(np.concatenate([active, hard, random]))
    return drawn


def _explanation(answer: str) -> str:
    """One line of text. EndpointError: it is empty, too long, or has characters that do not show."""
    line = " ".join(answer.split()).strip("\"'")
    try:
        return checked_text(line, "the explanation")
    except ValueError as error:
        raise EndpointError(str(error)) from error


def _predicted(answer: str, n: int) -> Mask:
    """[n], the excerpts that an answer calls active. EndpointError: it is not JSON of that form."""
    text = answer.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        numbers = json.loads(text)["active"]
        valid = isinstance(numbers, list) and all(type(i) is int and 1 <= i <= n for i in numbers)
    except (ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise EndpointError(f'the answer is not {{"active": [numbers from 1 to {n}]}}: {answer[:80]!r}')
    predicted = np.zeros(n, bool)
    predicted[[i - 1 for i in numbers]] = True
    return predicted
