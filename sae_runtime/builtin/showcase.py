"""Prints the strongest held-out contexts of features of the builtin dictionaries.

    python -m sae_runtime.builtin.showcase resid-late 12 345      # these features
    python -m sae_runtime.builtin.showcase resid-late --find 40   # features worth a look

`--find` ranks features that fire on 0.02 % to 2 % of tokens by how alike their strongest contexts are: the share of
contexts from the commonest kind of text, times the share that peak on the commonest token (ignoring case and spaces).
This favours features of one word or one kind of text. It is not a measure of quality.
"""

import argparse
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from sae_runtime import Backbone, Dictionary, load_dictionary
from sae_runtime.builtin import HELD_OUT
from sae_runtime.data.documents import read_documents
from sae_runtime.evaluation.top_contexts import FeatureContext, top_contexts

N_CONTEXTS = 8
RATES = (2e-4, 2e-2)


def alike(contexts: Sequence[FeatureContext]) -> float:
    """Share of contexts of the commonest kind of text, times the share with the commonest peak token; 0 to 1."""
    if len(contexts) < N_CONTEXTS:
        return 0.0
    kinds = Counter(context.kind for context in contexts)
    peaks = Counter(context.tokens[context.peak].strip().lower() for context in contexts)
    return max(kinds.values()) * max(peaks.values()) / len(contexts) ** 2


def worth_a_look(dictionary: Dictionary, contexts: Sequence[Sequence[FeatureContext]], n: int) -> list[int]:
    """The n features whose contexts are most alike; a pair of peak token and kind of text comes at most twice."""
    assert dictionary.statistics is not None
    rates = dictionary.statistics.firing_rate.tolist()
    ranked = sorted(
        (f for f in range(dictionary.n_latents) if RATES[0] <= rates[f] <= RATES[1]), key=lambda f: -alike(contexts[f])
    )
    seen: Counter[tuple[str, str]] = Counter()
    features = []
    for feature in ranked:
        if not contexts[feature]:
            continue
        strongest = contexts[feature][0]
        key = (strongest.tokens[strongest.peak].strip().lower(), strongest.kind)
        seen[key] += 1
        if seen[key] <= 2:
            features.append(feature)
    return features[:n]


def shaded(context: FeatureContext) -> Text:
    """One line: value, kind of text, and tokens, brighter where the feature is active, with the peak in brackets."""
    line = Text(f"{context.value:6.2f}  {context.kind:<9} ")
    for i, (token, activation) in enumerate(zip(context.tokens, context.activations, strict=True)):
        shown = token.replace("\n", "⏎")
        style = "bold yellow" if activation > 0.5 * context.value else "yellow" if activation > 0 else "dim"
        line.append(f"[{shown}]" if i == context.peak else shown, style=style)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionary", help="a builtin dictionary's name, such as resid-late")
    parser.add_argument("features", type=int, nargs="*", help="feature numbers")
    parser.add_argument("--find", type=int, default=0, metavar="N", help="also show N features that are worth a look")
    parser.add_argument("--contexts", type=int, default=N_CONTEXTS, help="contexts of each feature, at most 8")
    arguments = parser.parse_args()
    dictionary, backbone = load_dictionary(arguments.dictionary), Backbone.load("builtin")
    contexts = top_contexts(backbone, dictionary, read_documents([HELD_OUT]), N_CONTEXTS)
    assert dictionary.statistics is not None
    console = Console(width=200)
    for feature in arguments.features + worth_a_look(dictionary, contexts, arguments.find):
        rate = float(dictionary.statistics.firing_rate[feature])
        console.print(f"\n{dictionary.name} {feature}: fires on {rate:.3%} of tokens", style="bold", highlight=False)
        for context in contexts[feature][: arguments.contexts]:
            console.print(shaded(context), no_wrap=True, overflow="ellipsis")


if __name__ == "__main__":
    main()
