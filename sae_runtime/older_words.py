"""Words of other projects, and what this one says instead. Needs no torch.

They come from SAELens, OpenAI's sparse_autoencoder, dictionary_learning, sparsify and TransformerLens. One table serves
names in code (`sae_runtime.HookedTransformer`) and flags of the command line (`--model-path`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OurWord:
    """What stands for an older word: in code, and on the command line."""

    code: str
    flags: tuple[str, ...]
    """Flags of that meaning; a command has one of them at most."""
    elsewhere: str
    """What to do where a command has none of them."""
    argument: str = ""
    """What a command that takes it without a flag calls it."""


BACKBONE = OurWord(
    "Backbone.load(path_or_name)", ("--backbone",), "the server holds the model: `saeserve serve --backbone MODEL`"
)
DICTIONARY = OurWord(
    "load_dictionary(path_or_name)",
    ("--dictionaries", "--dictionary"),
    "`saeserve serve --dictionaries PATH` serves a dictionary, `saeserve evaluate PATH` measures one",
    "DICTIONARY",
)
SITE = OurWord(
    'a site "<layer>.<location>", such as "8.resid_post_mlp"',
    ("--site",),
    "a dictionary knows its site: `saeserve dictionaries` shows it",
)
ACTIVATIONS = OurWord(
    "Backbone.activations(input_ids, sites=[site])", (), "`saeserve features TEXT` shows the features of a text"
)
TRAINING = OurWord(
    "`saeserve train` (sae_runtime.training.run.run_training)", (), "`saeserve train` trains a dictionary"
)
LATENTS = OurWord("d.n_latents", ("--n-latents", "--grid-n-latents"), "`saeserve train --n-latents N`")
CONTEXT = OurWord("backbone.context_length", ("--context-length",), "`saeserve train --context-length N`")
TEXT = OurWord("`saeserve train --data FILE`", ("--data", "--sources", "--file"), "`saeserve train --data FILE`")
TOKENS = OurWord("TrainingConfig.tokens", ("--tokens",), "`saeserve train --tokens N`")
BATCH = OurWord("TrainingConfig.batch_tokens", ("--batch-tokens",), "`saeserve train --batch-tokens N`")
RATE = OurWord("TrainingConfig.learning_rate", ("--learning-rate",), "`saeserve train --learning-rate RATE`")
PENALTY = OurWord(
    "TrainingConfig.sparsity_coefficient", ("--sparsity-coefficient",), "`saeserve train --sparsity-coefficient L`"
)
FAMILY = OurWord("TrainingConfig.family", ("--family",), "`saeserve train --family NAME`")

_WORDS = {
    BACKBONE: """
        HookedTransformer HookedRootModule HookedSAETransformer TransformerBridge LanguageModel AutoModelForCausalLM
        model model-name model-path model-id model-name-or-path base-model llm pretrained-model tokenizer
    """,
    DICTIONARY: """
        SAE Sae SparseAutoencoder SparseAutoEncoder Autoencoder AutoEncoder AutoEncoderTopK AutoEncoderNew SparseCoder
        TopK TopKSAE StandardSAE GatedSAE GatedAutoEncoder JumpReLUSAE JumpReluAutoEncoder BatchTopKSAE MatryoshkaSAE
        BatchTopKTrainer MatryoshkaBatchTopKSAE TrainingSAE Transcoder CrossCoder from_pretrained load_pretrained
        load_from_pretrained load_from_hub load_from_disk load_many from_state_dict load_sae load_autoencoder load
        sae saes sae-path sae-id sae-name sae-release release autoencoder autoencoder-path ae ae-path dict-path
        dictionary-path sae-dir checkpoint-path
    """,
    SITE: """
        hook hooks hook-point hookpoint hookpoints hook-points hook-name hook-layer layer layers location
        submodule submodule-name
    """,
    ACTIVATIONS: "run_with_cache run_with_saes run_with_hooks ActivationCache ActivationsStore ActivationBuffer",
    TRAINING: "SAETrainingRunner LanguageModelSAETrainingRunner LanguageModelSAERunnerConfig SAETrainer trainSAE",
    LATENTS: "d-sae d-hidden dict-size dictionary-size num-latents n-features num-features n-dirs",
    CONTEXT: "context-size ctx-len max-seq-len seq-len",
    TEXT: "dataset dataset-path dataset-name texts corpus",
    TOKENS: "training-tokens num-tokens n-tokens total-training-tokens",
    BATCH: "batch-size train-batch-size-tokens train-batch-size sae-batch-size",
    RATE: "lr",
    PENALTY: "l1 l1-coefficient l1-coeff l1-penalty sparsity-penalty l0-coefficient",
    FAMILY: "architecture sae-type trainer-type activation-fn",
}


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


_OURS = {_plain(word): ours for ours, words in _WORDS.items() for word in words.split()}


def our_word(older: str) -> OurWord | None:
    """What stands for a word of another project, in any spelling of it; None for a word that is none of theirs."""
    return _OURS.get(_plain(older))
