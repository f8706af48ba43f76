import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_runtime import Backbone

WORDS = ("a", "small", "dictionary", "latent", "fires", "on", "every", "word", "that", "begins", "with", "this")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors of these tests are tiny: waiting for a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random GPT-2 of 2 layers, 16 wide, context 32, tokens are bytes and end-of-text (id 0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_backbone")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {byte: i for i, byte in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # GPT-2's initialisation is so small that every loss would be ln(vocabulary)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tiny_backbone_folder: Path) -> Backbone:
    return Backbone.load(tiny_backbone_folder)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 300 documents of few words."""
    generator = random.Random(0)
    lines = [{"text": " ".join(generator.choices(WORDS, k=generator.randint(5, 80)))} for _ in range(300)]
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def tiny_settings(words: Path, tiny_backbone_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run that trains in a second."""
    return {
        "site": "1.resid_post_mlp",
        "data": [words],
        "backbone": str(tiny_backbone_folder),
        "out": tmp_path / "tiny",
        "n_latents": 64,
        "k": 8,
        "tokens": 3_000,
        "batch_tokens": 128,
        "backbone_tokens": 512,
        "buffer_tokens": 2048,
        "held_out_fraction": 0.1,
        "evaluation_tokens": 200,
        "statistics_tokens": 200,
        "aux_k": 8,
        "dead_after_tokens": 1000,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "backbone_dtype": "float32",
        "compute_dtype": "bfloat16",
    }
