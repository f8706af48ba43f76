"""Spans are checked against the definition (slices of the text) and against the tokenizers library's own offsets."""

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sae_runtime.model.tokenization import TextTokenizer

TEXTS = [
    "",
    "plain words and 12 numbers",
    "naïve façade, Zürich",
    "日本語 and 🙂🙃 emoji, e\u0301 combining, \x00 control",
    "  two  spaces\n\n\ttabs \u00a0 end ",
    "before<|endoftext|>after",
]


def train_bpe(vocab_size: int = 285, alphabet: list[str] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["plain words and more plain words, naïve façade 日本 日本"] * 4, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    return train_bpe()


@pytest.fixture(scope="module")
def tokenizer(backend: Tokenizer) -> TextTokenizer:
    return TextTokenizer.copy_of(backend)


def check_spans(tokenizer: TextTokenizer, text: str) -> None:
    encoded, raw = tokenizer.encode(text), text.encode()
    assert b"".join(map(tokenizer.token_bytes, encoded.ids)) == raw
    end = 0
    for i, token_id in enumerate(encoded.ids):
        byte_span = slice(encoded.byte_starts[i], encoded.byte_ends[i])
        assert byte_span.start == end  # no gaps
        assert raw[byte_span] == tokenizer.token_bytes(token_id)
        # The character span is the smallest that covers the bytes.
        chars = slice(encoded.char_starts[i], encoded.char_ends[i])
        before, inside = len(text[: chars.start].encode()), len(text[chars].encode())
        assert before <= byte_span.start < before + len(text[chars.start].encode())
        assert before + inside - len(text[chars.stop - 1].encode()) < byte_span.stop <= before + inside
        end = byte_span.stop
    assert end == len(raw)


@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_exact(tokenizer: TextTokenizer, backend: Tokenizer, text: str) -> None:
    check_spans(tokenizer, text)
    encoded, reference = tokenizer.encode(text), backend.encode(text, add_special_tokens=False)
    assert encoded.ids == reference.ids
    spans = list(zip(encoded.char_starts.tolist(), encoded.char_ends.tolist(), strict=True))
    assert spans == reference.offsets


def test_spans_of_random_unicode(tokenizer: TextTokenizer) -> None:
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(300):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 20)))
        check_spans(tokenizer, text)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_character_over_several_tokens(tokenizer: TextTokenizer) -> None:
    encoded = tokenizer.encode("a🙂b")
    assert encoded.byte_starts.tolist() == [0, 1, 2, 3, 4, 5]
    assert encoded.char_starts.tolist() == [0, 1, 1, 1, 1, 2]
    assert encoded.char_ends.tolist() == [1, 2, 2, 2, 2, 3]


def test_special_tokens_stand_for_their_own_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"
    assert tokenizer.encode("<|endoftext|>").ids == [0]
    assert 0 not in tokenizer.encode("plain").ids  # none are added


def test_every_byte_is_a_token(tokenizer: TextTokenizer) -> None:
    tokens = [tokenizer.token_bytes(i) for i in range(285)]
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)
    assert b" plain" in tokens


@pytest.mark.parametrize("token_id", [-1, 285, 10**9])
def test_ids_outside_the_vocabulary(tokenizer: TextTokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match="vocabulary of 285"):
        tokenizer.token_bytes(token_id)


def test_text_without_a_utf8_form_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800b")


def test_a_text_with_bytes_that_the_vocabulary_lacks_is_refused() -> None:
    incomplete = TextTokenizer(train_bpe(alphabet=["a"]))
    assert incomplete.encode("plain words").ids
    with pytest.raises(ValueError, match="stand for other bytes than 'Ω'"):
        incomplete.encode("Ω")


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Lowercase(),
        normalizers.NFD(),
        normalizers.NFKC(),
        normalizers.NFKD(),
        normalizers.Strip(),
        normalizers.Replace(" ", "_"),
        normalizers.Prepend("_"),
        normalizers.BertNormalizer(lowercase=False),
        normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]),
    ],
    ids=str,
)
def test_a_normaliser_that_changes_ordinary_text_is_refused(normalizer: normalizers.Normalizer) -> None:
    backend = train_bpe()
    backend.normalizer = normalizer
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        TextTokenizer(backend)


def test_a_space_before_every_text_is_refused() -> None:
    backend = train_bpe()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        TextTokenizer(backend)


@pytest.mark.parametrize(
    ("normalizer", "kept", "changed"),
    [(normalizers.NFC(), "é", "e\u0301"), (normalizers.StripAccents(), "plain", "e\u0301")],
    ids=str,
)
def test_a_normaliser_of_rare_texts_refuses_only_those(
    normalizer: normalizers.Normalizer, kept: str, changed: str
) -> None:
    """Qwen's tokenizers bring texts into Unicode's form C, in which nearly all texts are."""
    backend = train_bpe()
    backend.normalizer = normalizer
    tokenizer = TextTokenizer(backend)
    check_spans(tokenizer, kept)
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        tokenizer.encode(changed)


def test_an_added_token_that_takes_the_spaces_around_it_refuses_only_such_texts() -> None:
    backend = train_bpe()
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer = TextTokenizer(backend)
    check_spans(tokenizer, "a<mask> b")
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        tokenizer.encode("a <mask> b")


def test_a_pre_tokenizer_that_drops_characters_refuses_the_texts_that_have_them() -> None:
    backend = train_bpe()
    split = pre_tokenizers.Split("z", behavior="removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = TextTokenizer(backend)
    check_spans(tokenizer, "plain")
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        tokenizer.encode("zebra")


def test_dropout_is_off(backend: Tokenizer, tokenizer: TextTokenizer) -> None:
    """With BPE dropout a text would have other tokens at every call."""
    state = json.loads(backend.to_str())
    state["model"]["dropout"] = 0.5
    dropping = Tokenizer.from_str(json.dumps(state))
    text = TEXTS[1] * 3
    assert len({tuple(dropping.encode(text).ids) for _ in range(20)}) > 1
    steady = TextTokenizer(dropping)
    assert {tuple(steady.encode(text).ids) for _ in range(20)} == {tuple(tokenizer.encode(text).ids)}


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not byte-level.*日"):
        TextTokenizer(Tokenizer(models.WordLevel({"日": 0}, unk_token="日")))


def test_stored_truncation_and_padding_do_not_apply(backend: Tokenizer) -> None:
    changed = Tokenizer.from_str(backend.to_str())
    changed.enable_truncation(2)
    changed.enable_padding(length=64, pad_token="<|endoftext|>")
    check_spans(TextTokenizer(changed), TEXTS[1])


def test_fingerprint_depends_on_vocabulary_and_merges_alone(backend: Tokenizer, tokenizer: TextTokenizer) -> None:
    state = json.loads(backend.to_str())
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]  # the older spelling
    state["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    assert TextTokenizer(Tokenizer.from_str(json.dumps(state))).fingerprint == tokenizer.fingerprint
    assert TextTokenizer(train_bpe(280)).fingerprint != tokenizer.fingerprint
