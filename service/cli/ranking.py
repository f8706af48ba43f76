"""`--rank-by`: the order in which commands show features."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sae_runtime.dictionary.ranking import Ranking
from service.client import Client

_BY_NAME: dict[str, Ranking] = {"activation": "activation", "surprise": "surprise", "z-score": "z_score"}


def add_ranking_argument(parser: argparse._ActionsContainer, name: str = "--rank-by") -> None:
    parser.add_argument(
        name,
        choices=tuple(_BY_NAME),
        help="the order of features: by activation, by surprise = activation x -log10(share of tokens on which the "
        "feature fires), or by z-score [surprise where all dictionaries have statistics, else activation]",
    )


def chosen_ranking(named: str | None, dictionaries: Sequence[str] | None, client: Client) -> Ranking:
    """The order that the command line names, or the default for these dictionaries (all loaded ones if None)."""
    if named is not None:
        return _BY_NAME[named]
    known = client.list_dictionaries()
    shown = [d for d in known if dictionaries is None or d.name in dictionaries]
    return "surprise" if all(d.has_statistics for d in shown) else "activation"


def name_of(ranking: Ranking) -> str:
    """The order as the command line spells it."""
    return ranking.replace("_", "-")
