"""Edits: their arithmetic against a slow float64 reading of the definition, their positions, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sae_runtime import (
    Backbone,
    Condition,
    Dictionary,
    Edit,
    EditConflict,
    InvalidEdit,
    LatentStatistics,
    Site,
    UnknownDictionary,
)
from sae_runtime.edits import (
    AfterText,
    AllOf,
    AnyOf,
    BatchEdits,
    BatchRow,
    Reference,
    RowEdits,
    Where,
    check_edits,
)
from tests.reference_edits import EditedRow

D_IN, N_LATENTS, K = 20, 120, 10
SITE = Site.parse("1.resid_post_mlp")


class Row(NamedTuple):
    """Edits of a row, and which of its tokens are in the batch."""

    edits: Sequence[Edit]
    prompt_length: int
    past: int
    length: int


def batch_of(rows: Sequence[Row], dictionaries: dict[str, Dictionary]) -> BatchEdits:
    return BatchEdits(
        [BatchRow(RowEdits(row.edits, dictionaries, row.prompt_length), row.past, row.length) for row in rows]
    )


def make_dictionary(kind: str = "topk", *, seed: int = 0, site: str | None = str(SITE)) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    positive = normal(N_LATENTS).abs()
    statistics = LatentStatistics(
        positive, positive * 0.3, positive, positive + 1, torch.zeros(N_LATENTS, 1), torch.tensor([0.5]), 100
    )
    encoder = normal(N_LATENTS, D_IN) / D_IN**0.5
    return Dictionary(
        encoder=encoder,
        decoder=normal(N_LATENTS, D_IN) / D_IN**0.5,
        pre_bias=normal(D_IN) * 0.3,
        latent_bias=normal(N_LATENTS) * 0.3,
        activation="relu" if kind.startswith("relu") else "topk",
        k=None if kind.startswith("relu") else K,
        normalization={"normalised": "layer_norm", "centred": "centred"}.get(kind.split()[-1], "none"),
        site=site,
        statistics=statistics,
    )


def activations(rows: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def slow_edit(rows: Sequence[Row], dictionaries: dict[str, Dictionary], site: Site, x: Tensor) -> Tensor:
    """The definition in float64, one token and one edit at a time."""
    wide = {name: dictionary.to(dtype=torch.float64) for name, dictionary in dictionaries.items()}
    edited = []
    for row, tokens in zip(rows, x.double().split([row.length for row in rows]), strict=True):
        reference = EditedRow(row.edits, wide, row.prompt_length)
        reference.first = row.past
        edited.append(reference.apply(str(site), tokens))
    return torch.cat(edited)


def whole_row(edits: Sequence[Edit], length: int = 12, prompt_length: int = 12) -> list[Row]:
    return [Row(edits, prompt_length=prompt_length, past=0, length=length)]


KINDS = ["topk", "topk normalised", "topk centred", "relu", "relu normalised"]
OPERATIONS: dict[str, dict[str, Any]] = {
    "set": {"operation": "set", "value": 3.5},
    "set to zero": {"operation": "set", "value": 0.0},
    "set in maxima": {"operation": "set", "value": 1.5, "unit": "max"},
    "add": {"operation": "add", "value": -0.7},
    "add in maxima": {"operation": "add", "value": 0.4, "unit": "max"},
    "scale": {"operation": "scale", "value": 2.5},
    "clamp below": {"operation": "clamp", "minimum": 0.5},
    "clamp above": {"operation": "clamp", "maximum": 0.8},
    "clamp both in maxima": {"operation": "clamp", "minimum": 0.1, "maximum": 0.2, "unit": "max"},
    "ablate to zero": {"operation": "ablate_zero"},
    "ablate to mean": {"operation": "ablate_mean"},
    "conditional": {"operation": "set", "value": 4.0},  # on another active latent
}


def active_feature(dictionary: Dictionary, x: Tensor, *, choice: int = 0) -> int:
    """A latent that is active on some tokens and not on others; other choices give other latents."""
    share = (dictionary.encode_dense(x) > 0).float().mean(dim=0)
    return int((share - 0.5).abs().argsort()[choice])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_equals_the_definition(operation: str, kind: str) -> None:
    dictionaries = {"d": make_dictionary(kind)}
    x = activations()
    feature = active_feature(dictionaries["d"], x)
    condition = Condition(active_feature(dictionaries["d"], x, choice=1), threshold=0.1)
    edits = [Edit("d", feature, **OPERATIONS[operation], condition=condition if operation == "conditional" else None)]
    check_edits(edits, dictionaries)
    batch = batch_of(whole_row(edits), dictionaries)
    expected = slow_edit(whole_row(edits), dictionaries, SITE, x)
    assert not torch.equal(expected, x.double())  # the case tests something
    torch.testing.assert_close(batch.apply(SITE, x).double(), expected, rtol=1e-5, atol=1e-5)


def test_many_edits_on_packed_rows_at_two_sites() -> None:
    """Prefill and decode rows side by side, two dictionaries at one site, one at another."""
    early = Site.parse("0.resid_pre")
    dictionaries = {
        "a": make_dictionary("topk normalised", seed=1),
        "b": make_dictionary("relu", seed=2),
        "c": make_dictionary("relu normalised", seed=3, site=str(early)),
    }
    rows = [
        Row([], prompt_length=4, past=0, length=4),
        Row(
            [
                Edit("a", 5, "set", value=2.0, positions="prompt"),
                Edit("a", 5, "set", value=1.0, positions="generated"),
                Edit("b", 7, "scale", value=3.0, positions=(0, 2, 9)),
                Edit("c", 8, "ablate_mean"),
            ],
            prompt_length=3,
            past=0,
            length=5,
        ),
        Row([Edit("b", 7, "add", value=1.0, positions="generated")], prompt_length=6, past=6, length=1),
        Row([Edit("a", 9, "set", value=1.0, positions="prompt")], prompt_length=6, past=6, length=1),
        Row([Edit("a", 9, "clamp", maximum=0.1, condition=Condition(5, 0.1))], prompt_length=1, past=0, length=1),
    ]
    batch = batch_of(rows, dictionaries)
    assert batch.sites == (early, SITE)
    x = activations(12)
    for site in batch.sites:
        torch.testing.assert_close(
            batch.apply(site, x).double(), slow_edit(rows, dictionaries, site, x), rtol=1e-5, atol=1e-5
        )


def test_no_edits_return_the_very_tensor() -> None:
    x = activations()
    for rows in ([], whole_row([]), [Row([Edit("d", 0, "set", value=1, positions=(99,))], 12, 0, 12)]):
        batch = batch_of(rows, {"d": make_dictionary()})
        assert batch.sites == ()
        assert not batch
        assert batch.apply(SITE, x) is x


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_edits_are_bitwise_untouched_and_so_is_the_input(kind: str) -> None:
    x = activations()
    original = x.clone()
    rows = [Row([], 5, 0, 5), Row([Edit("d", 4, "set", value=9.0, positions=(1,))], 7, 0, 7)]
    changed = batch_of(rows, {"d": make_dictionary(kind)}).apply(SITE, x)
    others = torch.arange(12) != 6
    assert torch.equal(changed[others].view(torch.int32), original[others].view(torch.int32))
    assert not torch.equal(changed[6], original[6])
    assert torch.equal(x, original)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_to_the_value_it_has_changes_nothing(kind: str) -> None:
    dictionary, x = make_dictionary(kind), activations()
    feature = active_feature(dictionary, x)
    z = dictionary.encode_features(x, torch.tensor([feature]))[:, 0]
    edits = [Edit("d", feature, "set", value=float(z[t]), positions=(t,)) for t in range(12)]
    torch.testing.assert_close(batch_of(whole_row(edits), {"d": dictionary}).apply(SITE, x), x, rtol=1e-6, atol=1e-6)
    for neutral in (Edit("d", feature, "scale", value=1.0), Edit("d", feature, "add", value=0.0)):
        assert torch.equal(batch_of(whole_row([neutral]), {"d": dictionary}).apply(SITE, x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_error_preserving(kind: str) -> None:
    """h' - decode(z') is h - decode(z): what the dictionary does not reconstruct stays as it was."""
    dictionary, x = make_dictionary(kind), activations()
    feature = active_feature(dictionary, x)
    changed = batch_of(whole_row([Edit("d", feature, "set", value=2.0)]), {"d": dictionary}).apply(SITE, x)
    encoded = dictionary.encode(x)
    z = encoded.to_dense()
    z[:, feature] = 2.0
    decoded = z @ dictionary.decoder + dictionary.pre_bias
    if encoded.input_statistics is not None:
        decoded = decoded * encoded.input_statistics.std + encoded.input_statistics.mean
    error = x - dictionary.decode(encoded)
    torch.testing.assert_close(changed - decoded, error, rtol=1e-4, atol=1e-4)


def test_ablated_latent_reads_zero_when_encoded_again() -> None:
    """With orthonormal tied weights and no normalisation, re-encoding sees exactly the edit."""
    directions = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(4))).Q
    zeros = torch.zeros(D_IN)
    dictionary = Dictionary(
        encoder=directions, decoder=directions, pre_bias=zeros, latent_bias=zeros, activation="relu", site=str(SITE)
    )
    x = activations()
    before = dictionary.encode_dense(x)
    changed = batch_of(whole_row([Edit("d", 3, "ablate_zero")]), {"d": dictionary}).apply(SITE, x)
    after = dictionary.encode_dense(changed)
    assert before[:, 3].max() > 0.5
    assert after[:, 3].abs().max() < 1e-5
    others = torch.arange(D_IN) != 3
    torch.testing.assert_close(after[:, others], before[:, others], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", (0, 3, 4, 7)])
def test_cached_decoding_edits_the_same_positions_as_one_pass(positions: Any) -> None:
    """A prompt of 4 tokens in one step and 4 generated tokens one by one, against all 8 at once."""
    dictionaries, x = {"d": make_dictionary("topk normalised")}, activations(8)
    edits = [Edit("d", 6, "add", value=2.0, positions=positions)]
    at_once = batch_of([Row(edits, 4, 0, 8)], dictionaries).apply(SITE, x)
    pieces = [batch_of([Row(edits, 4, 0, 4)], dictionaries).apply(SITE, x[:4])]
    pieces += [batch_of([Row(edits, 4, t, 1)], dictionaries).apply(SITE, x[t : t + 1]) for t in range(4, 8)]
    torch.testing.assert_close(torch.cat(pieces), at_once, rtol=1e-6, atol=1e-6)
    edited = [t for t in range(8) if not torch.equal(at_once[t], x[t])]
    expected = {"all": list(range(8)), "prompt": [0, 1, 2, 3], "generated": [4, 5, 6, 7]}.get(str(positions), positions)
    assert edited == list(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_keep_their_dtype(dtype: torch.dtype) -> None:
    dictionaries = {"d": make_dictionary("topk normalised")}
    x = activations().to(dtype)
    edits = [Edit("d", 5, "set", value=3.0)]
    changed = batch_of(whole_row(edits), dictionaries).apply(SITE, x)
    assert changed.dtype == dtype
    expected = slow_edit(whole_row(edits), dictionaries, SITE, x)
    torch.testing.assert_close(changed.double(), expected, rtol=2**-7, atol=2**-6)


def test_edits_that_leave_the_range_of_the_activations_are_refused() -> None:
    edits = [Edit("d", 5, "set", value=1e6)]
    batch = batch_of(whole_row(edits), {"d": make_dictionary()})
    assert batch.apply(SITE, activations()).isfinite().all()
    with pytest.raises(ValueError, match=r"edits at 1\.resid_post_mlp leave the range of torch\.float16"):
        batch.apply(SITE, activations().half())


def test_autograd_sees_an_edit_as_a_constant() -> None:
    x = activations().requires_grad_()
    batch_of(whole_row([Edit("d", 5, "set", value=3.0)]), {"d": make_dictionary()}).apply(SITE, x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (Edit("", 0, "set"), "dictionary"),
        (Edit("d", -1, "set"), "feature"),
        (Edit("d", 1.5, "set"), "feature"),  # type: ignore[arg-type]
        (Edit("d", 0, "double"), "operation"),  # type: ignore[arg-type]
        (Edit("d", 0, "set", value=float("nan")), "value"),
        (Edit("d", 0, "add", value=float("inf")), "value"),
        (Edit("d", 0, "ablate_zero", value=1.0), "value"),
        (Edit("d", 0, "clamp"), "minimum"),
        (Edit("d", 0, "clamp", minimum=2.0, maximum=1.0), "minimum"),
        (Edit("d", 0, "clamp", maximum=float("nan")), "maximum"),
        (Edit("d", 0, "set", maximum=1.0), "maximum"),
        (Edit("d", 0, "set", unit="percent"), "unit"),  # type: ignore[arg-type]
        (Edit("d", 0, "scale", value=2.0, unit="max"), "unit"),
        (Edit("d", 0, "set", positions="first"), "positions"),  # type: ignore[arg-type]
        (Edit("d", 0, "set", positions=()), "positions"),
        (Edit("d", 0, "set", positions=(0, -1)), "positions"),
        (Edit("d", 0, "set", condition=Condition(-1)), "condition"),
        (Edit("d", 0, "set", condition=Condition(1, float("nan"))), "condition"),
        (Edit("d", N_LATENTS, "set"), "feature"),
        (Edit("d", 0, "set", condition=Condition(N_LATENTS)), "condition"),
        (Edit("bare", 0, "ablate_mean"), "operation"),
        (Edit("bare", 0, "set", unit="max"), "unit"),
        (Edit("nowhere", 0, "set"), "dictionary"),
    ],
)
def test_wrong_edits_name_their_field(edit: Edit, field: str) -> None:
    dictionaries = {
        "d": make_dictionary(),
        "bare": replace(make_dictionary(), statistics=None),
        "nowhere": make_dictionary(site=None),
    }
    with pytest.raises(InvalidEdit, match=rf"^edits\[1\]\.{field}: ") as caught:
        check_edits([Edit("d", 1, "ablate_zero"), edit], dictionaries)
    assert (caught.value.field, caught.value.index) == (field, 1)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("edit", "field", "reason"),
    [
        (Edit("d", 0, "set", positions=AfterText("")), "positions", "empty text"),
        (Edit("d", 0, "set", positions=AfterText("é" * 129)), "positions", "258 bytes"),
        (Edit("d", 0, "set", positions=AfterText("a", "each")), "positions", "without max_tokens"),
        (Edit("d", 0, "set", positions=AfterText("a", "last")), "positions", "'first' or 'each'"),  # type: ignore[arg-type]
        (Edit("d", 0, "set", positions=AfterText("a", max_tokens=0)), "positions", "1 or more"),
        (Edit("d", 0, "resample"), "reference", "needs a reference text"),
        (Edit("d", 0, "resample", reference=Reference("")), "reference", "no tokens"),
        (Edit("d", 0, "resample", reference=Reference((1,), "first")), "reference", "expected one of"),  # type: ignore[arg-type]
        (Edit("d", 0, "set", reference=Reference("a")), "reference", "belongs to resample"),
        (Edit("d", 1, "replace"), "feature", "whole dictionary"),
        (Edit("d", 0, "replace", value=2.0), "value", "takes no value"),
        (Edit("d", 0, "set", values=(1.0, float("nan"))), "values", "finite"),
        (Edit("d", 0, "add", values=(1.0,)), "values", "belongs to set"),
        (Edit("d", 0, "set", condition=AllOf(())), "condition", "at least one"),
        (Edit("d", 0, "set", condition=AnyOf((Condition(0),) * 17)), "condition", "17 thresholds"),
        (Edit("d", 0, "set", condition=Condition(0, dictionary="")), "condition", "dictionary is empty"),
        (Edit("d", 0, "set", condition=Condition(0, comparison="below")), "condition", "at_most"),  # type: ignore[arg-type]
        (Edit("d", 0, "set", condition=Condition(0, unit="x")), "condition", "'raw' or 'max'"),  # type: ignore[arg-type]
        (Edit("d", 0, "set", condition=AnyOf((Condition(1), Condition(N_LATENTS)))), "condition", "outside"),
        (Edit("d", 0, "set", condition=Condition(0, 1.0, "bare", unit="max")), "condition", "needs statistics"),
        (Edit("d", 0, "set", condition=Condition(0, 1.0, "late")), "condition", "after the edit's site"),
        (Edit("decoder", 0, "set"), "dictionary", "transcoder"),
        (Edit("far", 0, "set"), "dictionary", "layers 0 to 1"),
    ],
)
def test_what_an_edit_cannot_say(edit: Edit, field: str, reason: str) -> None:
    dictionaries = {
        "d": make_dictionary(),
        "bare": replace(make_dictionary(), statistics=None),
        "late": make_dictionary(site="2.resid_post_mlp"),
        "far": make_dictionary(site="7.resid_pre"),
        "decoder": replace(make_dictionary(), transcoder=True),
    }
    backbone = Backbone.random(n_layers=2, d_model=D_IN, n_heads=2)
    with pytest.raises(InvalidEdit, match=rf"^edits\[0\]\.{field}: .*{reason}"):
        check_edits([edit], dictionaries, backbone=None if edit.condition else backbone)


def test_conditions_nest_to_a_depth() -> None:
    condition: Where = Condition(0)
    for _ in range(4):
        condition = AllOf((condition, Condition(1)))
    check_edits([Edit("d", 0, "set", condition=condition)], {"d": make_dictionary()})
    with pytest.raises(InvalidEdit, match="more than 4 inside one another"):
        check_edits([Edit("d", 0, "set", condition=AnyOf((condition,)))], {"d": make_dictionary()})


@pytest.mark.parametrize(
    ("edits", "names"),
    [
        ([Edit("d", 0, "replace"), Edit("e", 0, "replace")], ("edits[0] (replace", "edits[1] (replace")),
        ([Edit("d", 0, "replace"), Edit("d", 0, "replace", positions="last")], ("edits[0]", "positions last")),
        ([Edit("e", 3, "set"), Edit("d", 0, "replace")], ("edits[0] (set", "edits[1] (replace", "'e' and 'd'")),
        ([Edit("d", 0, "replace", positions=(4,)), Edit("e", 3, "set", positions="last")], ("edits[0]", "edits[1]")),
        ([Edit("d", 3, "set", positions=AfterText("x")), Edit("d", 3, "add", positions=(0,))], ("after 'x'",)),
        (
            [Edit("d", 3, "set", condition=Condition(1, 2.0)), Edit("d", 3, "add", condition=Condition(2, 3.0))],
            ("edits[0] (set, positions all, conditional)", "edits[1] (add, positions all, conditional)"),
        ),
    ],
)
def test_conflicts_name_both(edits: list[Edit], names: tuple[str, ...]) -> None:
    dictionaries = {"d": make_dictionary(), "e": make_dictionary()}
    with pytest.raises(EditConflict) as raised:
        check_edits(edits, dictionaries, prompt_length=5)
    assert all(name in str(raised.value) for name in names)


def test_a_replacement_goes_with_its_own_edits_and_with_other_sites_and_positions() -> None:
    other_site = make_dictionary(site="0.resid_pre")
    dictionaries = {"d": make_dictionary(), "e": make_dictionary(), "other": other_site}
    check_edits(
        [
            Edit("d", 0, "replace", positions="prompt"),
            Edit("d", 3, "set"),
            Edit("other", 0, "replace"),
            Edit("e", 4, "set", positions="generated"),
        ],
        dictionaries,
    )


def test_unknown_dictionary_names_those_loaded() -> None:
    with pytest.raises(UnknownDictionary, match=r"edits\[0\]\.dictionary: no dictionary 'x'; loaded: d"):
        check_edits([Edit("x", 0, "set")], {"d": make_dictionary()})


@pytest.mark.parametrize(
    ("a", "b", "prompt_length", "conflict"),
    [
        ("all", "all", None, True),
        ("all", (3,), None, True),
        ("prompt", "generated", None, False),
        ("prompt", "prompt", None, True),
        ((1, 2), (3, 4), None, False),
        ((1, 2), (2, 3), None, True),
        ("prompt", (9,), None, True),
        ("prompt", (9,), 5, False),
        ("prompt", (4,), 5, True),
        ("generated", (4,), 5, False),
        ("generated", (5,), 5, True),
        ("last", "generated", None, False),
        ("last", "prompt", None, True),
        ("last", "all", None, True),
        ("last", (3,), None, True),
        ("last", (3,), 5, False),
        ("last", (4,), 5, True),
        (AfterText("a"), "prompt", 5, True),
        (AfterText("a"), AfterText("b"), None, True),
    ],
)
def test_two_edits_of_one_latent_conflict_where_they_overlap(
    a: Any, b: Any, prompt_length: int | None, conflict: bool
) -> None:
    dictionaries = {"d": make_dictionary(), "e": make_dictionary()}
    edits = [Edit("d", 3, "set", positions=a), Edit("d", 3, "ablate_zero", positions=b)]
    check_edits([edits[0], replace(edits[1], feature=4), replace(edits[1], dictionary="e")], dictionaries)
    if conflict:
        with pytest.raises(EditConflict, match=r"edits\[0\] \(set.*edits\[1\] \(ablate_zero.*feature 3 of 'd'"):
            check_edits(edits, dictionaries, prompt_length)
    else:
        check_edits(edits, dictionaries, prompt_length)
