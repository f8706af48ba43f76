"""A backbone's tokenizer, from either form of Hugging Face's files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sae_runtime import Backbone

pytestmark = pytest.mark.any_cpu


@pytest.fixture(scope="module")
def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some words to merge, some more words"] * 3, trainer)
    return tokenizer


def test_both_forms_of_tokenizer_files(tmp_path: Path, folder: Path, byte_bpe: Tokenizer) -> None:
    byte_bpe.save(str(folder / "tokenizer.json"))
    modern = Backbone.load(folder)
    (folder / "tokenizer.json").unlink()
    byte_bpe.model.save(str(folder))  # vocab.json and merges.txt, the form of GPT-2's release
    released = Backbone.load(folder)
    assert modern.has_tokenizer
    text = "some words, größer 🙂<|endoftext|>"
    expected = byte_bpe.encode(text, add_special_tokens=False).ids
    for backbone in (released, Backbone.load(folder)):
        encoded = backbone.encode_text(text)
        assert encoded.ids == expected
        assert b"".join(map(backbone.token_bytes, encoded.ids)) == text.encode()
    assert modern.tokenizer_fingerprint == released.tokenizer_fingerprint != ""


def test_calls_of_the_transformers_tokenizer_leave_encode_text_alone(folder: Path, byte_bpe: Tokenizer) -> None:
    byte_bpe.save(str(folder / "tokenizer.json"))
    backbone = Backbone.load(folder)
    before = backbone.encode_text("some words to merge").ids
    assert backbone.tokenizer is not None
    backbone.tokenizer("some words to merge", truncation=True, max_length=2)
    assert backbone.encode_text("some words to merge").ids == before


def test_without_tokenizer_files(backbone: Backbone) -> None:
    assert backbone.tokenizer is None
    assert backbone.tokenizer_fingerprint == ""
    with pytest.raises(ValueError, match="give token ids"):
        backbone.encode_text("text")
    with pytest.raises(ValueError, match="give token ids"):
        backbone.token_bytes(0)


def test_loading_does_not_import_transformers() -> None:
    """It takes seconds, which every start of a replica would pay."""
    code = (
        "import sys; from sae_runtime import Backbone, load_dictionary, list_builtin_dictionaries as names;"
        "Backbone.load().encode_text('text'); [load_dictionary(name) for name in names()];"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
