"""Edits of latents as data, and their arithmetic inside a forward pass.

An edit changes the value z_f of one latent to z'_f at some token positions of a row. The activation h of the edited
site becomes

    h' = h + std * sum_f (z'_f - z_f) d_f

with d_f the latent's decoder row and std the scale that the dictionary's input normalisation took out (1 without
normalisation). What the dictionary does not reconstruct stays in h: the edit is error-preserving, and an edit that does
not change z_f does not change h. Several dictionaries at one site all read the activation as it was before any edit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sae_runtime.autoencoder import Dictionary
from sae_runtime.errors import EditConflict, UnknownDictionary
from sae_runtime.sites import Site

Operation = Literal["set", "add", "scale", "clamp", "ablate_zero", "ablate_mean"]
OPERATIONS: tuple[str, ...] = ("set", "add", "scale", "clamp", "ablate_zero", "ablate_mean")
Positions = Literal["all", "prompt", "generated"] | tuple[int, ...]
POSITION_NAMES: tuple[str, ...] = ("all", "prompt", "generated")


class InvalidEdit(ValueError):
    """A field of an edit is wrong; `field` names it and `index` is the edit's place in its list, where known."""

    def __init__(self, field: str, message: str, index: int | None = None) -> None:
        where = field if index is None else f"edits[{index}].{field}"
        super().__init__(f"{where}: {message}")
        self.field, self.reason, self.index = field, message, index


@dataclass(frozen=True)
class Condition:
    """Edit only the tokens on which a latent of the same dictionary is above a threshold (before any edit)."""

    feature: int
    threshold: float = 0.0  # in latent activation units


@dataclass(frozen=True)
class Edit:
    """One change to one latent. Positions count tokens from the start of the row, 0-based, across cached decoding.

    set: z' = value.  add: z' = z + value.  scale: z' = value * z.  clamp: z' = z limited to [minimum, maximum].
    ablate_zero: z' = 0.  ablate_mean: z' = the latent's mean over all tokens.
    """

    dictionary: str
    feature: int
    operation: Operation
    value: float = 0.0  # of set, add and scale
    minimum: float | None = None  # of clamp, at least one of the two
    maximum: float | None = None
    unit: Literal["raw", "max"] = "raw"  # of set, add and clamp: latent activation units, or × the recorded maximum
    positions: Positions = "all"  # "prompt": below the row's prompt length, "generated": from there on
    condition: Condition | None = None

    def validate(self, index: int | None = None) -> None:
        """InvalidEdit names the first field that is wrong by itself; `check_edits` also looks at the dictionary."""

        def wrong(field: str, message: str) -> InvalidEdit:
            return InvalidEdit(field, message, index)

        if not self.dictionary:
            raise wrong("dictionary", "is empty, expected a dictionary's name")
        if not _is_index(self.feature):
            raise wrong("feature", f"is {self.feature!r}, expected a latent index, 0 or more")
        if self.operation not in OPERATIONS:
            raise wrong("operation", f"is {self.operation!r}, expected one of {', '.join(OPERATIONS)}")
        for field in ("value", "minimum", "maximum"):
            number = getattr(self, field)
            if number is not None and not math.isfinite(number):
                raise wrong(field, f"is {number}, expected a finite number")
        if self.operation == "clamp":
            if self.minimum is None and self.maximum is None:
                raise wrong("minimum", "clamp needs a minimum, a maximum or both")
            if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
                raise wrong("minimum", f"is {self.minimum}, above the maximum {self.maximum}")
        elif self.minimum is not None or self.maximum is not None:
            field = "minimum" if self.minimum is not None else "maximum"
            raise wrong(field, f"belongs to clamp, the operation is {self.operation}")
        if self.operation not in ("set", "add", "scale") and self.value != 0:
            raise wrong("value", f"is {self.value}, but {self.operation} takes no value")
        if self.unit not in ("raw", "max"):
            raise wrong("unit", f"is {self.unit!r}, expected 'raw' or 'max'")
        if self.unit == "max" and self.operation not in ("set", "add", "clamp"):
            raise wrong("unit", f"'max' applies to set, add and clamp, the operation is {self.operation}")
        if isinstance(self.positions, tuple):
            if not self.positions:
                raise wrong("positions", "is empty, expected token positions or 'all', 'prompt', 'generated'")
            for position in self.positions:
                if not _is_index(position):
                    raise wrong("positions", f"holds {position!r}, expected token positions, 0 or more")
        elif self.positions not in POSITION_NAMES:
            raise wrong("positions", f"is {self.positions!r}, expected 'all', 'prompt', 'generated' or token positions")
        if self.condition is not None:
            if not _is_index(self.condition.feature):
                raise wrong("condition", f"feature is {self.condition.feature!r}, expected a latent index, 0 or more")
            if not math.isfinite(self.condition.threshold):
                raise wrong("condition", f"threshold is {self.condition.threshold}, expected a finite number")

    def at(self, position: int, prompt_length: int) -> bool:
        """Whether the edit covers a token position, its condition aside."""
        if self.positions == "all":
            return True
        if self.positions == "prompt":
            return position < prompt_length
        if self.positions == "generated":
            return position >= prompt_length
        return position in self.positions


def check_edits(
    edits: Sequence[Edit], dictionaries: Mapping[str, Dictionary], prompt_length: int | None = None
) -> None:
    """Validate the edits of one row against the dictionaries at hand, before it runs.

    UnknownDictionary; InvalidEdit (a ValueError with `field` and `index`) for a wrong field, a feature outside the
    dictionary, or a unit or operation that needs statistics that the dictionary lacks; EditConflict for two edits of
    one latent at a common position. Without `prompt_length` explicit positions count as overlapping both "prompt" and
    "generated". Conditions are not considered: both may hold.
    """
    for index, edit in enumerate(edits):
        edit.validate(index)
        dictionary = dictionaries.get(edit.dictionary)
        if dictionary is None:
            known = ", ".join(sorted(dictionaries)) or "none"
            raise UnknownDictionary(f"edits[{index}].dictionary: no dictionary {edit.dictionary!r}; loaded: {known}")
        if dictionary.site is None:
            raise InvalidEdit("dictionary", f"{edit.dictionary!r} does not say which site it reads", index)
        limit = f"0..{dictionary.n_latents - 1} of {edit.dictionary!r}"
        if edit.feature >= dictionary.n_latents:
            raise InvalidEdit("feature", f"is {edit.feature}, outside {limit}", index)
        if edit.condition is not None and edit.condition.feature >= dictionary.n_latents:
            raise InvalidEdit("condition", f"feature is {edit.condition.feature}, outside {limit}", index)
        if dictionary.statistics is None:
            if edit.operation == "ablate_mean":
                raise InvalidEdit("operation", f"ablate_mean needs statistics, {edit.dictionary!r} has none", index)
            if edit.unit == "max":
                raise InvalidEdit("unit", f"'max' needs statistics, {edit.dictionary!r} has none", index)
    earlier: dict[tuple[str, int], list[int]] = {}
    for index, edit in enumerate(edits):
        for other in earlier.setdefault((edit.dictionary, edit.feature), []):
            if _overlap(edits[other].positions, edit.positions, prompt_length):
                raise EditConflict(
                    f"edits[{other}] ({edits[other].operation}, positions {_shown(edits[other].positions)}) and "
                    f"edits[{index}] ({edit.operation}, positions {_shown(edit.positions)}) both write feature "
                    f"{edit.feature} of {edit.dictionary!r} at common positions"
                )
        earlier[edit.dictionary, edit.feature].append(index)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(positions: Positions) -> str:
    if isinstance(positions, tuple):
        return "[" + ", ".join(map(str, positions[:8])) + (", ...]" if len(positions) > 8 else "]")
    return positions


def _overlap(a: Positions, b: Positions, prompt_length: int | None) -> bool:
    if a == "all" or b == "all":
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return not set(a).isdisjoint(b)
    if not isinstance(a, tuple) and not isinstance(b, tuple):
        return a == b
    explicit, named = (a, b) if isinstance(a, tuple) else (b, a)
    assert isinstance(explicit, tuple)
    if prompt_length is None:
        return True
    return any((p < prompt_length) == (named == "prompt") for p in explicit)


@dataclass(frozen=True)
class RowEdits:
    """The edits of one row of a packed batch, and where in the row the batch's tokens are."""

    edits: Sequence[Edit]
    prompt_length: int  # tokens of the row's prompt; a token at this position or later is a generated one
    past: int  # position in the row of the first token in the batch
    length: int  # tokens of the row in the batch


@dataclass(frozen=True, eq=False)
class _DictionaryEdits:
    """Everything that one dictionary changes in a batch: P (token, latent) pairs over T tokens and F latents."""

    dictionary: Dictionary
    tokens: Tensor  # int64 [T], places in the packed batch, ascending
    features: Tensor  # int64 [F], ascending
    token_of_pair: Tensor  # int64 [P], into tokens
    feature_of_pair: Tensor  # int64 [P], into features
    arithmetic: Tensor  # [6, P]: scale, shift, minimum, maximum of z' = clamp(scale * z + shift); condition's threshold
    condition_of_pair: Tensor | None  # int64 [P], into features; None if no edit has a condition

    def delta(self, x: Tensor) -> Tensor:
        """What to add to the activations of the edited tokens: x [T, width] -> [T, width], float32 or better."""
        dictionary = self.dictionary
        z, statistics = dictionary.encode_ascending(x, self.features)  # [T, F]
        z = z.to(self.arithmetic.dtype)
        old = z[self.token_of_pair, self.feature_of_pair]  # [P]
        scale, shift, minimum, maximum, threshold = self.arithmetic
        change = torch.clamp(scale * old + shift, minimum, maximum) - old
        if self.condition_of_pair is not None:
            change = change * (z[self.token_of_pair, self.condition_of_pair] > threshold)
        changes = torch.zeros_like(z).index_put_((self.token_of_pair, self.feature_of_pair), change, accumulate=True)
        delta = changes @ dictionary.decoder[self.features].to(changes.dtype)
        return delta if statistics is None else delta * statistics.std


class EditPlan:
    """The edits of a packed batch, compiled; `apply` is the `edit` callable of `Backbone.forward`.

    Tokens without an edit are not encoded and come out bitwise as they went in.
    """

    def __init__(self, by_site: Mapping[Site, Sequence[_DictionaryEdits]]) -> None:
        self._by_site = by_site
        self.sites: tuple[Site, ...] = tuple(sorted(by_site))

    def __bool__(self) -> bool:
        return bool(self.sites)

    def apply(self, site: Site, x: Tensor) -> Tensor:
        """The edited activations of a site, x [N, width] -> [N, width]; x itself where nothing is to be done.

        Latents are read without gradient: to autograd an edit is a constant added to x. ValueError: x is not finite at
        an edited token, or the edited values overflow x's dtype.
        """
        changed = x
        for edits in self._by_site.get(site, ()):
            delta = edits.delta(x[edits.tokens].detach())
            rows = (changed[edits.tokens].to(delta.dtype) + delta).to(x.dtype)
            if not bool(rows.isfinite().all()):
                raise ValueError(f"edits at {site} leave the range of {x.dtype}")
            changed = changed.index_copy(0, edits.tokens, rows)
        return changed


def plan_edits(rows: Sequence[RowEdits], dictionaries: Mapping[str, Dictionary]) -> EditPlan:
    """Compile the edits of the rows of a packed batch, in its order.

    The edits must have passed `check_edits` with the same dictionaries. Rows whose edits cover none of their tokens in
    this batch cost nothing.
    """
    pairs: dict[str, list[tuple[int, Edit]]] = {}
    start = 0
    for row in rows:
        for edit in row.edits:
            covered = _covered(edit.positions, row)
            if covered:
                pairs.setdefault(edit.dictionary, []).extend((start + offset, edit) for offset in covered)
        start += row.length
    by_site: dict[Site, list[_DictionaryEdits]] = {}
    for name, wanted in pairs.items():
        dictionary = dictionaries[name]
        if dictionary.site is None:
            raise ValueError(f"dictionary {name!r} does not say which site it reads")
        by_site.setdefault(Site.parse(dictionary.site), []).append(_compile(dictionary, wanted))
    return EditPlan(by_site)


def _covered(positions: Positions, row: RowEdits) -> Sequence[int]:
    """Offsets, among the row's tokens in the batch, that an edit covers."""
    if isinstance(positions, tuple):
        return [p - row.past for p in sorted(set(positions)) if row.past <= p < row.past + row.length]
    boundary = min(max(row.prompt_length - row.past, 0), row.length)  # first generated token in the batch
    if positions == "prompt":
        return range(boundary)
    return range(boundary if positions == "generated" else 0, row.length)


def _compile(dictionary: Dictionary, wanted: Sequence[tuple[int, Edit]]) -> _DictionaryEdits:
    tokens = sorted({token for token, _ in wanted})
    edits = list({id(edit): edit for _, edit in wanted}.values())
    conditions = [edit.condition for edit in edits if edit.condition is not None]
    features = sorted({edit.feature for edit in edits} | {condition.feature for condition in conditions})
    place_of_token = {token: place for place, token in enumerate(tokens)}
    place_of_feature = {feature: place for place, feature in enumerate(features)}
    arithmetic = {id(edit): _arithmetic(edit, dictionary) for edit in edits}
    device = dictionary.device
    dtype = torch.float64 if dictionary.dtype == torch.float64 else torch.float32

    def places(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return _DictionaryEdits(
        dictionary=dictionary,
        tokens=places(tokens),
        features=places(features),
        token_of_pair=places([place_of_token[token] for token, _ in wanted]),
        feature_of_pair=places([place_of_feature[edit.feature] for _, edit in wanted]),
        arithmetic=torch.tensor([arithmetic[id(edit)] for _, edit in wanted], dtype=dtype, device=device).T,
        condition_of_pair=places(
            [place_of_feature[(edit.condition or Condition(edit.feature)).feature] for _, edit in wanted]
        )
        if conditions
        else None,
    )


def _arithmetic(edit: Edit, dictionary: Dictionary) -> tuple[float, float, float, float, float]:
    """Every operation as z' = clamp(scale * z + shift, minimum, maximum); and the condition's threshold."""
    statistics = dictionary.statistics
    unit = 1.0
    if edit.unit == "max":
        assert statistics is not None, "check_edits refuses this"
        unit = float(statistics.max[edit.feature])
    scale, shift, minimum, maximum = 1.0, 0.0, -math.inf, math.inf
    match edit.operation:
        case "set":
            scale, shift = 0.0, edit.value * unit
        case "add":
            shift = edit.value * unit
        case "scale":
            scale = edit.value
        case "clamp":
            minimum = -math.inf if edit.minimum is None else edit.minimum * unit
            maximum = math.inf if edit.maximum is None else edit.maximum * unit
        case "ablate_zero":
            scale = 0.0
        case "ablate_mean":
            assert statistics is not None, "check_edits refuses this"
            scale, shift = 0.0, float(statistics.mean[edit.feature])
    threshold = -math.inf if edit.condition is None else edit.condition.threshold
    return scale, shift, minimum, maximum, threshold
