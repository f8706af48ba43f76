"""The page of a feature in the terminal: label, figures, tokens, histogram, neighbours and contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from service.cli.view.output import has_width
from service.cli.view.tables import data_table, fact_table, print_table, printable
from service.cli.view.tokens import shaded, visible
from service.client import Context, FeaturePage, Label, Neighbor, TokenFigure

_BARS = " ▁▂▃▄▅▆▇█"
_KINDS = {"strongest": "strongest contexts", "quantile": "weaker activations", "random": "random activations"}


def show_page(console: Console, dictionary: str, page: FeaturePage, n_contexts: int) -> None:
    """Prints a page, with at most `n_contexts` contexts of a kind."""
    summary = page.summary
    name = f"{dictionary}:{summary.feature}"
    label = printable(summary.label) or "no simple label"
    console.print(Text.assemble((name, "bold cyan"), "  ", (label, "bold")), soft_wrap=not has_width(console))
    for each in page.labels:
        line = _score(each) if each.text == summary.label else f"{_score(each)}: {printable(each.text)}"
        console.print(Text(f"  {line}", style="dim"), soft_wrap=not has_width(console))
    console.print()
    print_table(console, fact_table(_facts(page)))
    if page.neighbors:
        console.print()
        print_table(console, _neighbors(page.neighbors))
    for kind, contexts in groupby(page.contexts, key=lambda context: context.kind):
        shown = list(contexts)
        if kind == "quantile":
            shown.sort(key=lambda context: -context.activation)
        if kind in _KINDS and n_contexts:
            console.print()
            print_table(console, _contexts(console, _KINDS[kind], shown[:n_contexts]))


def _score(label: Label) -> str:
    """Where a label comes from, and how well it predicts."""
    source = printable(label.source + (f" {label.author}" if label.author else ""))
    if label.f1 is None:
        return source
    score = f"{source}, F1 {label.f1:.2f}"
    if label.precision is not None and label.recall is not None:
        score += f" (precision {label.precision:.2f}, recall {label.recall:.2f})"
    return score + (f" on {label.n_positive} + {label.n_negative} held-out contexts" if label.n_positive else "")


def _facts(page: FeaturePage) -> dict[str, str | Text]:
    summary = page.summary
    facts: dict[str, str | Text] = {
        "fires on": f"{percent(summary.firing_rate)} of tokens ({page.n_firings:,}), "
        f"{percent(page.document_rate)} of documents",
        "activation": f"mean {page.mean_active:.2f} where it fires, at most {summary.max_activation:.2f}",
    }
    if summary.flags:
        facts["flags"] = ", ".join(flag.replace("_", " ") for flag in summary.flags)
    if page.token_r2 is not None:
        facts["explained"] = f"{page.token_r2:.0%} of the activation by the current token"
    facts["position"] = f"correlation with log(1 + position) {page.position_correlation:+.2f}"
    if page.rate_by_kind:
        facts["by kind"] = _rates(page.rate_by_kind)
    if page.rate_by_language:
        facts["by language"] = _rates(page.rate_by_language)
    if page.ablation_kl is not None:
        facts["ablation"] = f"KL {page.ablation_kl:.4f} nats where it fires"
    if page.output_score is not None:
        facts["output score"] = f"{page.output_score:+.2f} nats for what it promotes"
    if any(page.histogram):
        facts["histogram"] = Text.assemble(
            "0 ", (_histogram(page.histogram), "dark_orange"), f" {summary.max_activation:.2f}"
        )
    lists = {"active on": page.active_tokens, "promotes": page.promoted, "suppresses": page.suppressed}
    for title, tokens in lists.items():
        if tokens:
            facts[title] = _tokens(tokens)
    return facts


def _rates(rates: Mapping[str, float]) -> str:
    """The largest first."""
    largest = sorted(rates.items(), key=lambda item: -item[1])
    return ", ".join(f"{printable(name)} {percent(rate)}" for name, rate in largest)


def _tokens(tokens: Sequence[TokenFigure]) -> Text:
    shown = Text()
    for token in tokens:
        shown.append(f"{'  ' if shown else ''}{visible(token.piece)}")
        shown.append(f" ×{token.count:,}" if token.count else f" {token.value:+.2f}", style="dim")
    return shown


def _histogram(counts: Sequence[int]) -> str:
    """A bar for each bin, as high as the square root of its share of the fullest."""
    fullest = max(counts)
    steps = ((len(_BARS) - 1) * (count / fullest) ** 0.5 for count in counts)
    return "".join(_BARS[max(round(step), count > 0)] for step, count in zip(steps, counts, strict=True))


def _neighbors(neighbors: Sequence[Neighbor]) -> Table:
    how = {"decoder": "decoder cosine", "together": "fires together"}
    table = data_table("neighbour", Column("by"), "score", Column("label"))
    for near in neighbors:
        name = f"{near.dictionary}:{near.feature}"
        table.add_row(name, how.get(near.how, near.how), f"{near.score:.2f}", printable(near.label))
    return table


def _contexts(console: Console, title: str, contexts: Sequence[Context]) -> Table:
    """Text shaded by activation; without colours, the token at the peak is in brackets."""
    place = Column("document", style="dim", overflow="fold")
    table = data_table(Column("activation", justify="right", style="cyan"), Column(title, overflow="fold"), place)
    for context in contexts:
        pieces = list(context.tokens)
        if console.color_system is None:
            pieces[context.peak] = b"\xe2\x9f\xa6" + pieces[context.peak] + b"\xe2\x9f\xa7"
        where = f"{printable(context.place.source)}:{context.place.record}"
        table.add_row(f"{context.activation:.2f}", shaded(pieces, context.activations, one_line=True), where)
    return table


def percent(rate: float) -> str:
    """A share in percent with two digits that count, such as 12 %, 0.31 % or 1e-05 %."""
    return f"{100 * rate:.2g} %" if rate < 0.995 else "100 %"
