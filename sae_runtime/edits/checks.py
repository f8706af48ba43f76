"""Edits of one row against the dictionaries at hand, before it runs: unknown names, missing figures, conflicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sae_runtime.dictionary.dictionary import Dictionary, find_dictionary
from sae_runtime.edits.edit import AfterText, Condition, Edit, InvalidEdit, Positions, terms
from sae_runtime.errors import EditConflict, UnknownDictionary
from sae_runtime.model.sites import Site

if TYPE_CHECKING:
    from sae_runtime.model.backbone import Backbone


def check_edits(
    edits: Sequence[Edit],
    dictionaries: Mapping[str, Dictionary],
    prompt_length: int | None = None,
    backbone: Backbone | None = None,
) -> None:
    """Validate the edits of one row.

    UnknownDictionary; InvalidEdit (a ValueError with `field` and `index`) for a wrong field, a feature outside the
    dictionary, a unit or operation that needs statistics that the dictionary lacks, a condition at a later site, or,
    with `backbone`, a site that it does not have; EditConflict for two edits that may write the same thing on one
    token: one latent, or a replacement and anything of another dictionary at its site. Without `prompt_length` explicit
    positions count as overlapping every named range. Conditions are not considered: both may hold. Nor is where a text
    lies: positions after a text overlap all others.
    """
    for index, edit in enumerate(edits):
        edit.validate(index)
        site = _check_dictionary(edit.dictionary, "dictionary", index, dictionaries, backbone)
        _check_latent(edit, dictionaries[edit.dictionary], index)
        for term in terms(edit.condition):
            _check_term(term, edit, site, dictionaries, index, backbone)
    _check_conflicts(edits, dictionaries, prompt_length)


def _check_dictionary(
    name: str, field: str, index: int, dictionaries: Mapping[str, Dictionary], backbone: Backbone | None
) -> Site:
    try:
        dictionary = find_dictionary(name, dictionaries)
        return dictionary.require_site() if backbone is None else dictionary.site_in(backbone)
    except UnknownDictionary as error:
        raise UnknownDictionary(f"edits[{index}].{field}: {error}") from None
    except ValueError as error:
        raise InvalidEdit(field, f"{name!r} cannot be used: {error}", index) from None


def _check_latent(edit: Edit, dictionary: Dictionary, index: int) -> None:
    name = edit.dictionary
    if dictionary.transcoder:
        raise InvalidEdit("dictionary", f"{name!r} is a transcoder: it decodes to another site than it reads", index)
    if edit.feature >= dictionary.n_latents:
        raise InvalidEdit("feature", f"is {edit.feature}, outside 0..{dictionary.n_latents - 1} of {name!r}", index)
    if dictionary.statistics is None:
        if edit.operation == "ablate_mean":
            raise InvalidEdit("operation", f"ablate_mean needs statistics, {name!r} has none", index)
        if edit.unit == "max":
            raise InvalidEdit("unit", f"'max' needs statistics, {name!r} has none", index)


def _check_term(
    term: Condition,
    edit: Edit,
    site: Site,
    dictionaries: Mapping[str, Dictionary],
    index: int,
    backbone: Backbone | None,
) -> None:
    name = edit.dictionary if term.dictionary is None else term.dictionary
    read_at = _check_dictionary(name, "condition", index, dictionaries, backbone)
    dictionary = dictionaries[name]
    if term.feature >= dictionary.n_latents:
        limit = f"0..{dictionary.n_latents - 1} of {name!r}"
        raise InvalidEdit("condition", f"feature is {term.feature}, outside {limit}", index)
    if term.unit == "max" and dictionary.statistics is None:
        raise InvalidEdit("condition", f"unit 'max' needs statistics, {name!r} has none", index)
    if read_at > site:
        raise InvalidEdit("condition", f"reads {name!r} at {read_at}, after the edit's site {site}", index)


def _check_conflicts(edits: Sequence[Edit], dictionaries: Mapping[str, Dictionary], prompt_length: int | None) -> None:
    earlier: dict[tuple[str, int], list[int]] = {}
    for index, edit in enumerate(edits):
        if edit.operation == "replace":
            continue
        for other in earlier.setdefault((edit.dictionary, edit.feature), []):
            if _overlap(edits[other].positions, edit.positions, prompt_length):
                raise EditConflict(
                    f"{_named(edits, other)} and {_named(edits, index)} both write feature "
                    f"{edit.feature} of {edit.dictionary!r} at common positions"
                )
        earlier[edit.dictionary, edit.feature].append(index)
    for index, edit in enumerate(edits):
        if edit.operation != "replace":
            continue
        site = dictionaries[edit.dictionary].site
        for other, beside in enumerate(edits):
            both_replace = beside.operation == "replace"
            if (other >= index if both_replace else beside.dictionary == edit.dictionary) or (
                dictionaries[beside.dictionary].site != site
            ):
                continue
            if _overlap(beside.positions, edit.positions, prompt_length):
                first, second = sorted((other, index))
                what = (
                    f"both put a reconstruction at {site}"
                    if both_replace
                    else f"are of {edits[first].dictionary!r} and {edits[second].dictionary!r}, "
                    f"one of them a replacement of all that is at {site}"
                )
                raise EditConflict(f"{_named(edits, first)} and {_named(edits, second)} {what}, at common positions")


def _named(edits: Sequence[Edit], index: int) -> str:
    conditional = ", conditional" if edits[index].condition is not None else ""
    return f"edits[{index}] ({edits[index].operation}, positions {_shown(edits[index].positions)}{conditional})"


def _shown(positions: Positions) -> str:
    if isinstance(positions, AfterText):
        return f"after {positions.text[:40]!r}"
    if isinstance(positions, tuple):
        return "[" + ", ".join(map(str, positions[:8])) + (", ...]" if len(positions) > 8 else "]")
    return positions


def _overlap(a: Positions, b: Positions, prompt_length: int | None) -> bool:
    if isinstance(a, AfterText) or isinstance(b, AfterText):
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return not set(a).isdisjoint(b)
    if not isinstance(a, tuple) and not isinstance(b, tuple):
        return "generated" not in (a, b) or a == b or "all" in (a, b)
    explicit, named = (a, b) if isinstance(a, tuple) else (b, a)
    assert isinstance(explicit, tuple)
    if prompt_length is None or named == "all":
        return True
    if named == "last":
        return prompt_length - 1 in explicit
    return any((p < prompt_length) == (named == "prompt") for p in explicit)
