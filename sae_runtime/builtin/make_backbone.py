"""Trains the builtin backbone: a byte-level BPE tokenizer and a GPT-2 of about 6 million parameters.

    python -m sae_runtime.builtin.make_backbone --corpus CORPUS_DIR --out sae_runtime/builtin/backbone

The corpus directory holds .jsonl.xz files (see README.md beside this file). A run resumes from `<work>/checkpoint.pt`
if that exists. The learning rate is constant after its warm-up, and falls to zero over the last `decay_fraction` of
`tokens`. A checkpoint from the constant phase can therefore be finished with any `--tokens`, and gives the same weights
as a run with that budget from the start.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_runtime.atomic import atomic_file
from sae_runtime.data.documents import read_documents

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class BackboneRecipe:
    """All settings that determine the builtin backbone's weights."""

    files: tuple[str, ...] = ("books-00", "books-01", "books-02", "code", "maths", "parallel", "wiki")
    """Corpus files to train on, without `.jsonl.xz`; the documents of all of them are shuffled together."""
    tokenizer_files: tuple[str, ...] = ("books-00", "code", "maths", "parallel", "wiki")
    """Corpus files that the tokenizer is fitted on."""
    vocab_size: int = 8192
    n_layer: int = 5
    n_embd: int = 256
    n_head: int = 4
    n_positions: int = 512
    batch_rows: int = 16
    """Rows of n_positions tokens in one optimiser step."""
    tokens: int = 12_300_000
    """Tokens trained on; the decay phase ends here."""
    learning_rate: float = 3e-3
    """Peak rate of both optimisers (Muon's update is scaled to AdamW's RMS)."""
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    weight_decay: float = 0.1
    seed: int = 20260


def fit_tokenizer(recipe: BackboneRecipe, corpus: Path, work: Path) -> Tokenizer:
    """A byte-level BPE like GPT-2's, without a prefix space; fitted once, then read from `work`."""
    path = work / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((d.text for d in read_documents(_paths(corpus, recipe.tokenizer_files))), trainer)
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def tokenize_corpus(recipe: BackboneRecipe, tokenizer: Tokenizer, corpus: Path, work: Path) -> np.ndarray:
    """All documents in a seeded order, each followed by end-of-text, as uint16 [n_rows, n_positions]."""
    path = work / "tokens.npy"
    if not path.exists():
        texts = [d.text for d in read_documents(_paths(corpus, recipe.files))]
        order = np.random.default_rng(recipe.seed).permutation(len(texts))
        end = tokenizer.token_to_id(END_OF_TEXT)
        ids = np.concatenate(
            [
                np.asarray([*encoding.ids, end], dtype=np.uint16)
                for start in range(0, len(order), 256)
                for encoding in tokenizer.encode_batch([texts[i] for i in order[start : start + 256]])
            ]
        )
        n_rows = len(ids) // recipe.n_positions
        rows = ids[: n_rows * recipe.n_positions].reshape(n_rows, recipe.n_positions)
        # Rows are shuffled again, so that neighbouring rows are not from the same book.
        np.save(path, rows[np.random.default_rng(recipe.seed + 1).permutation(n_rows)])
    rows_on_disk: np.ndarray = np.load(path, mmap_mode="r")
    return rows_on_disk


def build_model(recipe: BackboneRecipe) -> GPT2LMHeadModel:
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=recipe.vocab_size,
        n_positions=recipe.n_positions,
        n_embd=recipe.n_embd,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel, recipe: BackboneRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (it learns more from a token), AdamW for embeddings, biases and gains."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in matrix_ids]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, n_steps: int, recipe: BackboneRecipe) -> float:
    decay_steps = round(n_steps * recipe.decay_fraction)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps, (n_steps - step) / decay_steps)


def train(recipe: BackboneRecipe, corpus: Path, work: Path, checkpoint_every_s: float = 120.0) -> GPT2LMHeadModel:
    tokenizer = fit_tokenizer(recipe, corpus, work)
    rows = tokenize_corpus(recipe, tokenizer, corpus, work)
    tokens_per_step = recipe.batch_rows * recipe.n_positions
    n_steps = recipe.tokens // tokens_per_step
    model = build_model(recipe)
    optimizers = build_optimizers(model, recipe)
    checkpoint, step = work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    print(f"{len(rows) * recipe.n_positions / 1e6:.1f}M tokens, {n_steps} steps, from step {step}", flush=True)

    saved_at, window_start, window_step = time.monotonic(), time.monotonic(), step
    while step < n_steps:
        batch = np.take(rows, np.arange(step * recipe.batch_rows, (step + 1) * recipe.batch_rows), axis=0, mode="wrap")
        ids = torch.from_numpy(batch.astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        targets = F.pad(ids[:, 1:], (0, 1), value=-100)  # the last position predicts nothing
        loss = F.cross_entropy(logits.view(-1, recipe.vocab_size).float(), targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps, recipe)
            optimizer.step()
        model.zero_grad(set_to_none=False)
        step += 1
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}; last good state in {checkpoint}")
        if step % 10 == 0:
            rate = (step - window_step) * tokens_per_step / (time.monotonic() - window_start)
            print(f"step {step}/{n_steps}  loss {loss.item():.3f}  {rate:.0f} tokens/s", flush=True)
            window_start, window_step = time.monotonic(), step
        if time.monotonic() - saved_at > checkpoint_every_s or step == n_steps:
            state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            with atomic_file(checkpoint) as file:
                torch.save(state, file)
            saved_at = time.monotonic()
    return model


def save(model: GPT2LMHeadModel, recipe: BackboneRecipe, work: Path, out: Path) -> None:
    """A Hugging Face folder with float16 weights, the tokenizer, and the recipe as `recipe.json`."""
    model.half().save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=recipe.n_positions,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def _paths(corpus: Path, names: tuple[str, ...]) -> list[Path]:
    return [corpus / f"{name}.jsonl.xz" for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="directory with the .jsonl.xz files")
    parser.add_argument("--out", type=Path, required=True, help="where the Hugging Face folder is written")
    parser.add_argument("--work", type=Path, default=Path("build/builtin"), help="tokens and checkpoints")
    for field in fields(BackboneRecipe):
        if field.type in (int, float):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    arguments = vars(parser.parse_args())
    corpus, out, work = (arguments.pop(name) for name in ("corpus", "out", "work"))
    recipe = BackboneRecipe(**arguments)
    work.mkdir(parents=True, exist_ok=True)
    save(train(recipe, corpus, work), recipe, work, out)


if __name__ == "__main__":
    main()
