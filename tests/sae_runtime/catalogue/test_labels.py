"""Labels of latents whose meaning is known, since a rule says where they fire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from sae_runtime.catalogue.detection import detection
from sae_runtime.catalogue.examples import Examples, LatentExamples
from sae_runtime.catalogue.labels import LEAST_F1, find_label, find_predicate
from sae_runtime.catalogue.predicates import Predicate, TextKind, Tokens, from_json
from sae_runtime.catalogue.vocabulary import Vocabulary

WORDS = [" the", " The", " cat", " dog", " =", "=", " x", " +", " walking", " going", " being", "\n", " 7", " 12"]
VOCABULARY = Vocabulary([word.encode() for word in WORDS])
N = len(WORDS)
Rule = Callable[[Examples], np.ndarray]


def random_text(n: int, seed: int) -> Examples:
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, N, (n, 24))
    position = generator.integers(0, 64, n)
    ids[np.arange(23, -1, -1) > position[:, None]] = -1
    return Examples(
        ids=ids,
        next_id=generator.integers(0, N, n),
        position=position,
        document=generator.integers(0, 50, n),
        kind=generator.integers(0, 3, n),
        language=generator.integers(-1, 4, n),
        activation=np.zeros(n, np.float32),
        hard=generator.random(n) < 0.3,
        kinds=("book", "code", "maths"),
        languages=("de", "en", "es", "fr"),
    )


def latent(rule: Rule, *, missed: float = 0.0, n: int = 1500, seed: int = 0) -> LatentExamples:
    """Up to 60 active and 100 silent tokens a half of a latent that fires by a rule, but for a share of tokens."""

    def half(seed: int) -> Examples:
        text = random_text(n, seed)
        generator = np.random.default_rng(seed)
        active = rule(text) & (generator.random(n) >= missed)
        chosen = np.concatenate([np.flatnonzero(active)[:60], np.flatnonzero(~active)[:100]])
        activation = np.where(active, generator.uniform(0.5, 3, n), 0).astype(np.float32)
        return replace(text, activation=activation, hard=text.hard & ~active)[chosen]

    return LatentExamples(half(2 * seed), half(2 * seed + 1))


def is_token(*words: str, back: int = 0) -> Rule:
    return lambda text: np.isin(text.token(back), [WORDS.index(word) for word in words])


def both(*rules: Rule) -> Rule:
    return lambda text: np.all([rule(text) for rule in rules], axis=0)


def in_kind(*kinds: str) -> Rule:
    return lambda text: np.isin(text.kind, [text.kinds.index(kind) for kind in kinds])


@pytest.mark.parametrize(
    ("rule", "label"),
    [
        (is_token(" cat"), 'token " cat"'),
        (is_token(" =", "="), 'token "=" with or without a space'),
        (is_token(" walking", " going", " being"), 'tokens that end with "ing"'),
        (is_token(" 7", " 12"), "digits"),
        (is_token(" dog", back=1), 'any token after " dog"'),
        (both(is_token(" cat"), is_token(" the", back=1)), 'token " cat" after " the"'),
        (both(is_token(" ="), in_kind("maths")), 'token " =" in "maths" text'),
        (in_kind("code"), 'any token in "code" text'),
        (lambda text: text.language == 2, "any token in Spanish text"),
        (lambda text: text.position == 0, "the first token of the row"),
        (lambda text: text.position < 8, "any token in the first 8 tokens of the row"),
        (lambda text: text.next_id == 3, 'any token before " dog", which it promotes'),
    ],
)
def test_a_rule_is_found_again(rule: Rule, label: str) -> None:
    found = find_label(latent(rule, n=6000), VOCABULARY, promoted=[3, 5, 7])
    assert found is not None
    assert (found.text, found.source) == (label, "rule")
    assert found.f1 == found.precision == found.recall == 1


def test_a_word_somewhere_before() -> None:
    rule: Rule = lambda text: (text.ids[:, -5:-1] == WORDS.index(" x")).any(1)  # noqa: E731
    found = find_label(latent(rule, n=6000), VOCABULARY)
    assert found is not None
    assert found.text == 'any token with " x" in the 4 tokens before'


def test_two_meanings_become_two_clauses() -> None:
    rule: Rule = lambda text: (  # noqa: E731
        both(is_token(" ="), in_kind("maths"))(text) | both(is_token(" cat"), is_token(" the", back=1))(text)
    )
    found = find_label(latent(rule, n=9000), VOCABULARY)
    assert found is not None
    assert set(found.text.split("; or ")) == {'token " =" in "maths" text', 'token " cat" after " the"'}


def test_figures_are_those_of_a_test_on_the_held_out_half() -> None:
    examples = latent(is_token(" cat"), missed=0.4)
    found = find_label(examples, VOCABULARY)
    assert found is not None
    predicate = from_json(found.predicate)
    test = detection(predicate.matches(examples.held_out, VOCABULARY), examples.held_out)
    assert (found.f1, found.precision, found.recall) == (test.f1, test.precision, test.recall)
    assert found.n_positive == examples.held_out.active.sum() == test.n_positive
    assert found.n_negative == (~examples.held_out.active).sum()
    assert found.f1 < 1


def test_the_held_out_half_has_no_say_in_the_choice() -> None:
    examples = latent(is_token(" cat", " dog"), missed=0.2)
    other = LatentExamples(examples.fit, latent(is_token(" cat", " dog"), seed=7).held_out)
    found, of_other = find_label(examples, VOCABULARY), find_label(other, VOCABULARY)
    assert found is not None
    assert of_other is not None
    assert found.predicate == of_other.predicate
    assert set(found.predicate["tokens"]) == {2, 3}
    assert found.f1 != of_other.f1


def test_what_holds_on_one_half_only_is_no_label() -> None:
    examples = LatentExamples(latent(is_token(" cat")).fit, latent(is_token(" dog")).held_out)
    assert find_label(examples, VOCABULARY) is None


def test_a_latent_without_meaning_has_no_label() -> None:
    """Else "any token", with a held-out F1 of 2/3, would be the label of everything."""
    n_labels = 0
    for seed in range(10):
        examples = latent(lambda text: np.random.default_rng(text.ids.sum()).random(len(text)) < 0.1, seed=seed)
        n_labels += find_label(examples, VOCABULARY) is not None
    assert n_labels == 0
    assert LEAST_F1 < 2 / 3


@pytest.mark.parametrize(("n_active", "n_silent"), [(4, 50), (50, 0), (0, 50)])
def test_too_few_examples_make_no_label(n_active: int, n_silent: int) -> None:
    half = latent(is_token(" cat")).fit
    active = np.flatnonzero(half.active)[:n_active]
    few = half[np.concatenate([active, np.flatnonzero(~half.active)[:n_silent]])]
    assert find_label(LatentExamples(few, half), VOCABULARY) is None
    assert find_label(LatentExamples(half, few), VOCABULARY) is None


def test_a_strong_activation_is_worth_words_that_a_weak_one_is_not() -> None:
    half = latent(in_kind("code"), n=6000).fit
    books = np.flatnonzero(half.kind == 0)[:2]
    for activation, names in ((5.0, ("code", "book")), (0.01, ("code",))):
        activations = np.where(half.active, 5.0, 0).astype(np.float32)
        activations[books] = activation
        with_books = replace(half, activation=activations, hard=half.hard & (activations == 0))
        # Of books, only those two are among the examples.
        assert find_predicate(with_books[(half.kind != 0) | with_books.active], VOCABULARY) == TextKind(names)


def test_the_same_examples_give_the_same_label() -> None:
    rules: Sequence[Rule] = [is_token(" cat", " =", " x"), in_kind("code")]
    for rule in rules:
        examples = latent(rule, missed=0.3)
        assert find_label(examples, VOCABULARY) == find_label(examples, VOCABULARY)


def test_hard_silent_tokens_narrow_a_label() -> None:
    """Random silent tokens never hold the word, so only the hard ones tell its contexts apart."""
    text = random_text(9000, 0)
    cat, maths = is_token(" cat")(text), in_kind("maths")(text)
    active = cat & maths
    random = np.flatnonzero(~cat)[:100]
    hard = np.flatnonzero(cat & ~maths)[:100]
    text = replace(text, activation=active.astype(np.float32), hard=np.zeros(len(text), bool))
    easy = text[np.concatenate([np.flatnonzero(active)[:60], random])]
    assert find_predicate(easy, VOCABULARY) == Tokens((2,))
    text.hard[hard] = True
    with_hard = find_predicate(text[np.concatenate([np.flatnonzero(active)[:60], random, hard])], VOCABULARY)
    assert with_hard is not None
    assert kinds_of(with_hard) == {"tokens", "text_kind"}


def kinds_of(predicate: Predicate) -> set[str]:
    return {member["kind"] for member in predicate.to_json()["of"]}
