"""Spans are checked against the definition (slices of the text) and against the tokenizers library's own offsets."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


def test_a_tokenizer_that_loses_bytes_is_refused() -> None:
    incomplete = TextTokenizer(train_bpe(alphabet=["a"]))
    with pytest.raises(ValueError, match="byte-level"):
        incomplete.encode("Ω")
    prefixed = train_bpe()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="byte-level"):
        TextTokenizer(prefixed).encode("word")


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
