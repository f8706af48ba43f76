"""Every operation, unit, position rule and condition, in every dictionary family, against hooks in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_runtime import Backbone, Dictionary, Edit, PackedTokens, Site
from sae_runtime.edits import (
    AfterText,
    AllOf,
    AnyOf,
    BatchEdits,
    BatchRow,
    Condition,
    Reference,
    RowEdits,
    check_edits,
    resolve_references,
)
from sae_runtime.model.forward import ForwardResult
from tests.builders import dictionaries_of_all_kinds
from tests.reference_edits import EditedModel

LAST = Site.parse("1.resid_post_mlp")
TEXT = "To be, or not to be: that"
PROMPT_LENGTH = 14
POSITIONS: dict[str, Any] = {
    "all": "all",
    "prompt": "prompt",
    "generated": "generated",
    "last": "last",
    "explicit": (0, 5, PROMPT_LENGTH, 20),
    "after the first": AfterText("o be"),
    "after the first, three tokens": AfterText("or", "first", 3),
    "after each, two tokens": AfterText("o", "each", 2),
}
OPERATIONS: dict[str, dict[str, Any]] = {
    "set": {"operation": "set", "value": 3.5},
    "set in maxima": {"operation": "set", "value": 1.5, "unit": "max"},
    "add": {"operation": "add", "value": -0.7},
    "add in maxima": {"operation": "add", "value": 0.4, "unit": "max"},
    "scale": {"operation": "scale", "value": 2.5},
    "clamp below": {"operation": "clamp", "minimum": 0.5},
    "clamp both in maxima": {"operation": "clamp", "minimum": 0.1, "maximum": 0.2, "unit": "max"},
    "ablate to zero": {"operation": "ablate_zero"},
    "ablate to mean": {"operation": "ablate_mean"},
    "resample last": {"operation": "resample", "reference": Reference("Another")},
    "resample aligned": {"operation": "resample", "reference": Reference("Other text", "aligned")},
    "resample mean": {"operation": "resample", "reference": Reference((5, 9, 70, 33), "mean")},
    "resample max": {"operation": "resample", "reference": Reference("Another", "max")},
    "replace": {"operation": "replace"},
}
FAMILIES = list(dictionaries_of_all_kinds(16))


class Setup:
    def __init__(self, folder: Path) -> None:
        self.backbone = Backbone.load(folder, dtype=torch.float64)
        self.dictionaries = dictionaries_of_all_kinds(self.backbone.d_model)
        self.plain = EditedModel(
            GPT2LMHeadModel.from_pretrained(folder).double(),
            self.dictionaries,
            self.backbone.token_bytes,
            lambda text: self.backbone.encode_text(text).ids,
        )
        self.tokens = tuple(self.backbone.encode_text(TEXT).ids)
        self.unedited = self.plain.logits(self.tokens, PROMPT_LENGTH, [])
        packed = PackedTokens.from_rows([self.tokens])
        acts = self.backbone.forward(packed, capture={d.site or "" for d in self.dictionaries.values()}).activations
        z = {n: d.encode_dense(acts[self.backbone.check_site(d.site or "")]) for n, d in self.dictionaries.items()}
        # Latents that are active on some tokens and not on others, the best choices first.
        self.choices = {name: ((v != 0).double().mean(0) - 0.5).abs().argsort().tolist() for name, v in z.items()}
        # Between two tokens' values: at one of them, rounding would decide.
        self.middle = {name: v.abs().median(0).values * 0.97 + 1e-3 for name, v in z.items()}

    def logits(self, rows: Sequence[Sequence[Edit]]) -> list[Tensor]:
        """One packed forward for all rows of edits."""
        batch_rows = []
        for edits in rows:
            check_edits(edits, self.dictionaries, PROMPT_LENGTH, self.backbone)
            ready = resolve_references(edits, self.dictionaries, self.backbone)
            row_edits = RowEdits(ready, self.dictionaries, PROMPT_LENGTH, token_bytes=self.backbone.token_bytes)
            batch_rows.append(BatchRow(row_edits, 0, len(self.tokens), self.tokens))
        batch = BatchEdits(batch_rows)
        packed = PackedTokens.from_rows([self.tokens] * len(rows))
        result = self.backbone.forward(packed, edit=batch.apply, edit_sites=batch.sites, capture=[LAST])
        return list(self.head(result).split(len(self.tokens)))

    @torch.no_grad()
    def head(self, result: ForwardResult) -> Tensor:
        """Logits [N, vocab] in float64, which the backbone gives in float32."""
        model = self.plain.model
        return model.lm_head(model.transformer.ln_f(result.activations[LAST]))

    def conditions(self, family: str) -> dict[str, Any]:
        """Of the edit's own dictionary, of one at an earlier site, and combinations."""
        own, other = self.choices[family], self.choices["relu"]
        above = Condition(own[1], float(self.middle[family][own[1]]))
        silent = Condition(other[1], 0.0, "relu", "at_most")
        strong = Condition(other[2], 0.05, "relu", "above", "max")
        return {
            "always": None,
            "above": above,
            "at most, elsewhere": silent,
            "all of": AllOf((strong, Condition(own[2], 0.0))),
            "any of all of": AnyOf((AllOf((silent, above)), AllOf((strong, AnyOf((above, Condition(own[3]))))))),
        }


@pytest.fixture(scope="module")
def setup(tiny_backbone_folder: Path) -> Setup:
    return Setup(tiny_backbone_folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_edit_equals_the_hooks(setup: Setup, operation: str, family: str) -> None:
    options = OPERATIONS[operation]
    feature = 0 if operation == "replace" else setup.choices[family][0]
    rows = [
        [Edit(family, feature, **options, positions=positions, condition=condition)]
        for positions in POSITIONS.values()
        for condition in setup.conditions(family).values()
    ]
    differ = 0
    for edits, logits in zip(rows, setup.logits(rows), strict=True):
        expected = setup.plain.logits(setup.tokens, PROMPT_LENGTH, edits)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        differ += not torch.allclose(expected, setup.unedited, rtol=1e-6, atol=1e-6)
    assert differ > len(rows) / 4  # the cases test something


MIXTURES: dict[str, Callable[[Mapping[str, list[int]]], list[Edit]]] = {
    "later sites see earlier edits": lambda f: [Edit(n, f[n][0], "add", 2.0) for n in FAMILIES],
    "several features of one": lambda f: [Edit("topk", f["topk"][i], "scale", -2.0 + i) for i in range(5)],
    "prompt and generated apart": lambda f: [
        Edit("gated", f["gated"][0], "set", 2.0, positions="prompt"),
        Edit("gated", f["gated"][0], "ablate_zero", positions="generated"),
        Edit("topk", f["topk"][0], "set", 1.0, positions="last", condition=Condition(f["gated"][1], 0.0, "gated")),
    ],
    "a reconstruction with edited latents": lambda f: [
        Edit("topk", 0, "replace", positions="generated"),
        Edit("topk", f["topk"][0], "set", 3.0),
        Edit("topk", f["topk"][1], "ablate_zero", condition=Condition(f["relu"][0], 0.0, "relu")),
    ],
    "reconstructions at several sites": lambda f: [
        Edit(n, 0, "replace", condition=Condition(f["relu"][2], 0.0, "relu")) for n in ("relu", "jumprelu", "signed")
    ],
    "a condition alone at a site": lambda f: [
        Edit("topk", f["topk"][0], "set", 4.0, condition=Condition(f["jumprelu"][0], 0.1, "jumprelu"))
    ],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_several_edits_equal_the_hooks(setup: Setup, name: str) -> None:
    edits = MIXTURES[name](setup.choices)
    (logits,) = setup.logits([edits])
    expected = setup.plain.logits(setup.tokens, PROMPT_LENGTH, edits)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, setup.unedited, atol=1e-6)


def test_rows_of_one_batch_do_not_touch_each_other(setup: Setup) -> None:
    rows = [[], *(make(setup.choices) for make in MIXTURES.values()), []]
    for edits, logits in zip(rows, setup.logits(rows), strict=True):
        expected = setup.plain.logits(setup.tokens, PROMPT_LENGTH, edits)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_decoding_step_by_step_equals_the_hooks_on_the_whole_sequence(setup: Setup) -> None:
    """Prompts in two chunks, then token by token with a cache and one planner, every position rule in the batch."""
    backbone, dictionaries = setup.backbone, setup.dictionaries
    edits = [
        [Edit("topk", setup.choices["topk"][0], "add", 3.0, positions=positions, condition=condition)]
        for positions in POSITIONS.values()
        for condition in list(setup.conditions("topk").values())[:3:2]
    ]
    edits.append([Edit("gated", setup.choices["gated"][0], "resample", reference=Reference(TEXT[::-1], "aligned"))])
    rows: list[Sequence[Edit]] = [(), *edits]
    row_edits = [
        RowEdits(
            resolve_references(own, dictionaries, backbone),
            dictionaries,
            PROMPT_LENGTH,
            token_bytes=backbone.token_bytes,
        )
        if own
        else None
        for own in rows
    ]
    cache, batch = backbone.new_cache(len(rows)), BatchEdits()
    outputs: list[list[Tensor]] = [[] for _ in rows]
    past = 0
    while past < len(setup.tokens):
        n = 7 if past < PROMPT_LENGTH else 1
        packed = PackedTokens.from_rows(
            [setup.tokens[past : past + n]] * len(rows), past=[past] * len(rows), slots=range(len(rows))
        )
        so_far = setup.tokens[: past + n]
        batch = batch.for_step([BatchRow(edits, past, n, so_far) for edits in row_edits])
        result = backbone.forward(packed, edit=batch.apply, edit_sites=batch.sites, cache=cache, capture=[LAST])
        for own, logits in zip(outputs, setup.head(result).split(n), strict=True):
            own.append(logits)
        past += n
    for own, logits in zip(rows, outputs, strict=True):
        expected = setup.plain.logits(setup.tokens, PROMPT_LENGTH, own)
        torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-9, atol=1e-9)


def test_an_edit_is_what_encode_and_decode_say(setup: Setup) -> None:
    """h' = h + decode(f') - decode(f) with the dictionary's own decode, for every family."""
    generator = torch.Generator().manual_seed(3)
    for name, d in setup.dictionaries.items():
        x = torch.randn(9, d.d_in, generator=generator, dtype=torch.float64)
        feature = setup.choices[name][0]
        batch = BatchEdits([BatchRow(RowEdits([Edit(name, feature, "set", 1.25)], setup.dictionaries, 9), 0, 9)])
        changed = batch.apply(batch.sites[0], x)
        f = d.encode(x)
        z = f.to_dense()
        z[:, feature] = 1.25
        torch.testing.assert_close(changed, x + _decode_dense(d, z, f) - d.decode(f), rtol=1e-10, atol=1e-10)


def _decode_dense(d: Dictionary, z: Tensor, like: Any) -> Tensor:
    from dataclasses import replace

    indices = torch.arange(d.n_latents).expand(len(z), -1)
    return d.decode(replace(like, indices=indices, values=z))
