"""Tokens equal those of Hugging Face's `generate` with hooks: every operation, position rule and condition, in company.

Temperature 0, float32. All requests of a test run in one engine, with few slots, a small cache and small prefill
pieces, so that they join, wait, move and leave in the midst of each other.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

import sae_runtime
from sae_runtime import Backbone, load_dictionary
from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.edits import AfterText, AllOf, AnyOf, BatchEdits, Condition, Edit, Reference, resolve_references
from service.engine.work import GenerateWork, SamplingOptions
from tests.builders import edited_model, random_rows, small_backbone, small_dictionaries
from tests.reference_edits import EditedModel
from tests.service.engine.runner import Runner

BUILTIN = Path(sae_runtime.__file__).parent / "builtin"
BACKBONE = small_backbone()
DICTIONARIES = small_dictionaries()
GREEDY = SamplingOptions(temperature=0)
PROMPTS = random_rows(6, (5, 30), seed=40)
REFERENCE = random_rows(1, (40, 40), seed=41)[0]


HOOKED = edited_model(BACKBONE, DICTIONARIES)


@cache
def firing(name: str, prompt: tuple[int, ...], rank: int = 0) -> int:
    """A feature that fires much on the prompt, so that every operation changes something."""
    d = DICTIONARIES[name]
    assert d.site is not None
    x = BACKBONE.activations(torch.tensor([prompt]), sites=[d.site])[d.site][0]
    return int(d.encode_dense(x).sum(0).argsort(descending=True)[rank])


OPERATIONS = {
    "set": {"operation": "set", "value": 6.0},
    "set x maximum": {"operation": "set", "value": 2.0, "unit": "max"},
    "add": {"operation": "add", "value": 5.0},
    "scale": {"operation": "scale", "value": -3.0},
    "clamp low": {"operation": "clamp", "minimum": 4.0},
    "clamp high": {"operation": "clamp", "maximum": 0.1, "unit": "max"},
    "clamp both": {"operation": "clamp", "minimum": 1.0, "maximum": 2.0},
    "ablate": {"operation": "ablate_zero"},
    "ablate to mean": {"operation": "ablate_mean"},
    "resample aligned": {"operation": "resample", "reference": Reference(REFERENCE, "aligned")},
    "resample mean": {"operation": "resample", "reference": Reference(REFERENCE, "mean")},
    "replace": {"operation": "replace"},
}


def position_rules(prompt: Sequence[int]) -> dict[str, object]:
    text = b"".join(map(BACKBONE.token_bytes, prompt[2:3])).decode(errors="ignore") or "e"
    return {
        "all": "all",
        "prompt": "prompt",
        "generated": "generated",
        "last": "last",
        "explicit": (0, 3, len(prompt) - 1, len(prompt), len(prompt) + 4),
        "after": AfterText(text),
        "after each": AfterText(text, "each", 2),
    }


def conditions(prompt: tuple[int, ...], second: str) -> list[object]:
    """On the dictionary "early" and a second one, which is not at a later site than the edit either."""
    early, other = firing("early", prompt), firing(second, prompt)
    above = Condition(early, 0.3, dictionary="early")
    return [
        Condition(other, 0.2, dictionary=second),
        Condition(early, 0.1, dictionary="early", unit="max"),
        Condition(early, 0.4, dictionary="early", comparison="at_most"),
        AllOf((above, Condition(other, 0.0, dictionary=second))),
        AnyOf(
            (AllOf((above, Condition(other, 0.5, dictionary=second))), Condition(early + 1, 0.2, dictionary="early"))
        ),
    ]


def work(prompt: tuple[int, ...], *edits: Edit, n: int = 9) -> GenerateWork:
    return GenerateWork(prompt, n, GREEDY, edits=edits, ignore_end_of_text=True)


def edit(name: str, prompt: tuple[int, ...], rank: int = 0, **fields: object) -> Edit:
    feature = 0 if fields["operation"] == "replace" else firing(name, prompt, rank)
    return Edit(name, feature, **fields)  # type: ignore[arg-type]


def check(works: Sequence[GenerateWork], seed: int) -> None:
    """Runs all in one engine, in a shuffled order, joining at different steps; each must give what hooks give."""
    rng = random.Random(seed)
    works = rng.sample(works, len(works))
    runner = Runner(BACKBONE, DICTIONARIES, max_concurrent_generations=7, prefill_chunk_tokens=16, max_cache_tokens=420)
    pending = list(works)
    while pending or not runner.done:
        for _ in range(rng.choice((0, 0, 1, 3))):
            if pending:
                ready = pending.pop(0)
                runner.join(replace(ready, edits=resolve_references(ready.edits, DICTIONARIES, BACKBONE)))
        runner.step()
    for i, each in enumerate(works):
        assert runner.ids(i) == HOOKED.greedy(each.prompt, each.max_new_tokens, each.edits)[0], each.edits


@pytest.mark.parametrize("name", DICTIONARIES)
def test_every_operation_and_position_rule(name: str) -> None:
    works = []
    for i, (operation, (rule, _)) in enumerate(itertools.product(OPERATIONS, position_rules(PROMPTS[0]).items())):
        prompt = PROMPTS[i % len(PROMPTS)]
        fields = OPERATIONS[operation] | {"positions": position_rules(prompt)[rule]}
        works.append(work(prompt, edit(name, prompt, **fields)))
    check(works, seed=1)


def test_every_condition() -> None:
    works = []
    for (j, prompt), (name, second) in itertools.product(
        enumerate(PROMPTS[:3]), (("wide", "wide"), ("delta", "mid"), ("mid", "mid"))
    ):
        for i, condition in enumerate(conditions(prompt, second)):
            for operation in ("set", "scale", "ablate to mean", "replace"):
                positions = list(position_rules(prompt).values())[(i + j) % 7]
                fields = OPERATIONS[operation] | {"condition": condition, "positions": positions}
                works.append(work(prompt, edit(name, prompt, **fields)))
    check(works, seed=2)


def test_several_features_dictionaries_and_sites_beside_plain_requests() -> None:
    works = []
    for i, prompt in enumerate(PROMPTS * 3):
        edits = [
            edit(name, prompt, rank, **list(OPERATIONS.values())[(i + rank + place) % 9])
            for place, name in enumerate(DICTIONARIES)
            for rank in range(3)
        ]
        works.append(work(prompt, *edits[: (i % 4) * 4], n=4 + i))
    check(works, seed=3)


@pytest.mark.parametrize("skipped", range(1, 11))
def test_an_engine_that_skips_one_step_is_noticed(skipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has teeth: were one decoded token not edited, some of these requests would come out otherwise."""
    works = [work(p, edit("mid", p, operation="add", value=8.0, positions="generated"), n=12) for p in PROMPTS]
    runner = Runner(BACKBONE, DICTIONARIES, *works)
    for_step, steps = BatchEdits.for_step, itertools.count()
    monkeypatch.setattr(
        BatchEdits, "for_step", lambda self, rows: for_step(self, [] if next(steps) == skipped else rows)
    )
    runner.run()
    whole = [HOOKED.greedy(w.prompt, 12, w.edits)[0] for w in works]
    assert [runner.ids(i) for i in range(len(works))] != whole


@pytest.fixture(scope="module")
def builtin() -> tuple[Backbone, dict[str, Dictionary], EditedModel]:
    backbone = Backbone.load("builtin")
    dictionaries: dict[str, Dictionary] = {}
    for folder in sorted((BUILTIN / "dictionaries").iterdir()):
        dictionary = load_dictionary(folder).to(dtype=torch.float32)
        dictionaries[dictionary.name] = dictionary
    reference = GPT2LMHeadModel.from_pretrained(BUILTIN / "backbone", dtype=torch.float32)
    return backbone, dictionaries, EditedModel(reference, dictionaries, backbone.token_bytes)


def test_the_model_that_ships_with_its_dictionaries(
    builtin: tuple[Backbone, dict[str, Dictionary], EditedModel],
) -> None:
    backbone, dictionaries, reference = builtin
    texts = ["Once upon a time, there was", "def main(argv):\n    ", "The answer is 3 + 4 =", "Le roi était"]
    works = []
    for i, text in enumerate(texts):
        prompt = tuple(backbone.encode_text(text).ids)
        name = list(dictionaries)[i % len(dictionaries)]
        site = dictionaries[name].site
        assert site is not None
        z = dictionaries[name].encode_dense(backbone.activations(torch.tensor([prompt]), sites=[site])[site][0])
        features = z.max(0).values.topk(3).indices.tolist()
        edits = (
            Edit(name, features[0], "set", 1.5, unit="max"),
            Edit(name, features[1], "ablate_mean", positions="generated"),
            Edit(name, features[2], "scale", 3.0, positions=(0, len(prompt), len(prompt) + 2)),
        )
        works += [work(prompt, *edits[:n], n=14) for n in range(4)]
    runner = Runner(backbone, dictionaries, *works, max_concurrent_generations=6, prefill_chunk_tokens=8).run()
    for i, each in enumerate(works):
        assert runner.ids(i) == reference.greedy(each.prompt, 14, each.edits)[0], (each.edits, i)
