"""Continuous batching against a slow loop over Hugging Face's model, one step at a time on this thread."""

from dataclasses import replace

import pytest
import torch

from sae_runtime.edits import Edit
from service.engine.errors import NonFiniteActivations
from service.engine.work import GenerateWork, SamplingOptions
from tests.builders import edited_model, random_rows, small_backbone, small_dictionaries
from tests.service.engine.runner import Runner

GREEDY = SamplingOptions(temperature=0)
BACKBONE = small_backbone()
DICTIONARIES = small_dictionaries()
SLOW = edited_model(BACKBONE, DICTIONARIES)


def runner(*works: GenerateWork, **settings: int) -> Runner:
    return Runner(BACKBONE, DICTIONARIES, *works, **settings)


def greedy(prompt: tuple[int, ...], n: int, *edits: Edit) -> GenerateWork:
    return GenerateWork(prompt, n, GREEDY, edits=edits, ignore_end_of_text=True)


def firing(dictionary: str, prompt: tuple[int, ...]) -> int:
    """The feature that fires most on the prompt, so that every operation changes something."""
    d = DICTIONARIES[dictionary]
    assert d.site is not None
    x = BACKBONE.activations(torch.tensor([prompt]), sites=[d.site])[d.site][0]
    return int(d.encode_dense(x).sum(0).argmax())


PROMPT = random_rows(1, (9, 9), seed=21)[0]
OPERATIONS = {
    "set": {"operation": "set", "value": 6.0},
    "set_max": {"operation": "set", "value": 2.0, "unit": "max"},
    "add": {"operation": "add", "value": 5.0},
    "scale": {"operation": "scale", "value": -3.0},
    "clamp_low": {"operation": "clamp", "minimum": 4.0},
    "clamp_high": {"operation": "clamp", "maximum": 0.1, "unit": "max"},
    "ablate_zero": {"operation": "ablate_zero"},
    "ablate_mean": {"operation": "ablate_mean"},
}


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", (0, 8, 10, 13)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_edited_greedy_tokens_equal_the_slow_loop(operation: str, positions: object) -> None:
    edits = [
        Edit(name, firing(name, PROMPT), positions=positions, **OPERATIONS[operation])  # type: ignore[arg-type]
        for name in DICTIONARIES
    ]
    run = runner(greedy(PROMPT, 10, *edits)).run()
    expected, logprobs = SLOW.greedy(PROMPT, 10, edits)
    assert run.ids(0) == expected
    assert run.logprobs(0) == pytest.approx(logprobs, abs=1e-4)


def test_edits_reach_every_decoded_token() -> None:
    """The log-probability of every token after the prompt differs from what it is with that one step unedited."""
    edit = Edit("mid", firing("mid", PROMPT), "add", 8.0, positions="generated")
    run = runner(greedy(PROMPT, 8, edit)).run()
    tokens = [*PROMPT, *run.ids(0)]
    for skipped in range(len(PROMPT), len(tokens) - 1):
        others = tuple(p for p in range(len(PROMPT), len(tokens)) if p != skipped)
        partial = Edit("mid", edit.feature, "add", 8.0, positions=others)
        logits = SLOW.next_logits(tokens[: skipped + 1], len(PROMPT), [partial])
        step = skipped + 1 - len(PROMPT)
        without = float(logits.log_softmax(0)[tokens[skipped + 1]])
        assert abs(run.logprobs(0)[step] - without) > 1e-3


def test_plain_and_edited_sequences_share_a_batch() -> None:
    prompts = random_rows(7, (1, 40), seed=3)
    works = [
        greedy(prompt, 6 + i, *([Edit("mid", firing("mid", prompt), "add", 9.0)] if i % 3 == 0 else []))
        for i, prompt in enumerate(prompts)
    ]
    # Few slots and small prefill chunks: some wait, some are in the midst of their prompt while others decode.
    run = runner(*works, max_concurrent_generations=3, prefill_chunk_tokens=11).run()
    for i, work in enumerate(works):
        assert run.ids(i) == SLOW.greedy(work.prompt, work.max_new_tokens, work.edits)[0]
        assert run.ids(i) == runner(work).run().ids(0)
        assert run.end(i).reason == "length"
        assert run.end(i).generated_tokens == work.max_new_tokens


def test_no_edits_is_the_plain_forward() -> None:
    run = runner(greedy(PROMPT, 12)).run()
    assert run.ids(0) == SLOW.greedy(PROMPT, 12)[0]


def test_sampled_tokens_do_not_depend_on_company() -> None:
    prompts = random_rows(8, (2, 30), seed=8)
    works = [
        GenerateWork(p, 20, SamplingOptions(temperature=0.8 + 0.2 * i, top_k=(i % 3) * 20, top_p=(i % 2) * 0.9, seed=i))
        for i, p in enumerate(prompts)
    ]
    together = runner(*works, max_concurrent_generations=4, prefill_chunk_tokens=16).run()
    for i, work in enumerate(works):
        alone = runner(work).run()
        assert together.ids(i) == alone.ids(0)
        assert together.text(i) == alone.text(0)
    assert len({tuple(together.ids(i)) for i in range(8)}) == 8


def test_a_sequence_may_join_at_any_step() -> None:
    first, second = greedy(PROMPT, 10), greedy(PROMPT[::-1], 5)
    run = runner(first)
    for _ in range(4):
        run.step()
    run.join(second)
    run.run()
    assert run.ids(0) == SLOW.greedy(first.prompt, 10)[0]
    assert run.ids(1) == SLOW.greedy(second.prompt, 5)[0]


def test_a_cancelled_sequence_leaves_its_slot_before_the_next_step() -> None:
    run = runner(greedy(PROMPT, 80), greedy(PROMPT[:4], 3), max_concurrent_generations=1)
    run.step()
    assert (run.running.n_active, len(run.waiting)) == (1, 1)
    run.requests[0].cancelled = True
    run.step()
    assert (run.running.n_active, len(run.waiting)) == (1, 0)
    assert run.run().ids(1) == SLOW.greedy(PROMPT[:4], 3)[0]
    assert len(run.ids(0)) == 1


def test_edits_that_overflow_fail_alone() -> None:
    """Through the logits of the last block, and through the encoder of a later site: neither poisons the batch."""
    huge = [Edit("delta", 3, "set", 3e38), Edit("early", 3, "set", 3e38)]
    later = Edit("mid", 4, "add", 1.0)
    works = [greedy(PROMPT, 5), greedy(PROMPT, 5, huge[0]), greedy(PROMPT, 5, huge[1], later), greedy(PROMPT[:3], 4)]
    run = runner(*works).run()
    for i in (1, 2):
        (error,) = run.events[run.requests[i]]
        assert isinstance(error, NonFiniteActivations)
    assert run.ids(0) == SLOW.greedy(PROMPT, 5)[0]
    assert run.ids(3) == SLOW.greedy(PROMPT[:3], 4)[0]
    assert run.running.n_active == 0


def test_a_slot_left_full_of_nan_does_not_reach_the_next_sequence() -> None:
    works = [greedy((*PROMPT, *PROMPT), 5, Edit("early", 3, "set", 3e38)), greedy(PROMPT[:3], 6)]
    run = runner(*works, max_concurrent_generations=1).run()
    assert run.ids(1) == SLOW.greedy(PROMPT[:3], 6)[0]


def test_generation_ends_when_the_context_is_full() -> None:
    prompt = random_rows(1, (BACKBONE.context_length - 5,) * 2, seed=2)[0]
    run = runner(greedy(prompt, 50)).run()
    assert run.ids(0) == SLOW.greedy(prompt, 5)[0]
    assert run.end(0).reason == "length"


def test_end_of_text_ends_and_is_not_returned() -> None:
    edit = Edit("delta", 0, "add", 0.0)
    seeds = range(60)
    for seed in seeds:
        work = GenerateWork(PROMPT, 60, SamplingOptions(temperature=1.5, seed=seed), edits=(edit,))
        run = runner(work).run()
        if run.end(0).reason == "end_of_text":
            break
    assert run.end(0).reason == "end_of_text"
    assert 0 not in run.ids(0)
    assert run.end(0).generated_tokens == len(run.ids(0)) + 1
    ignoring = GenerateWork(PROMPT, 60, work.sampling, edits=(edit,), ignore_end_of_text=True)
    longer = runner(ignoring).run()
    assert longer.ids(0)[: len(run.ids(0)) + 1] == [*run.ids(0), 0]
    assert longer.end(0).reason == "length"


@pytest.mark.parametrize("place", [0, 3])
def test_any_of_several_ends_of_text_ends(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """A model may have several (eos_token_id a list): chat models end a turn with one and a document with another."""
    plain = runner(greedy(PROMPT, 8)).run().ids(0)
    ends = (plain[place], 10_000)
    monkeypatch.setattr(BACKBONE, "settings", replace(BACKBONE.settings, eos_token_id=ends))
    run = runner(GenerateWork(PROMPT, 8, SamplingOptions(temperature=0))).run()
    assert run.end(0).reason == "end_of_text"
    assert run.ids(0) == plain[: plain.index(plain[place])]


def test_stop_strings_are_found_across_tokens() -> None:
    plain = runner(GenerateWork(PROMPT, 30, SamplingOptions(seed=4), ignore_end_of_text=True)).run()
    text = plain.text(0)
    start = next(i for i in range(8, len(text)) if text[: i + 2].count(text[i : i + 2]) == 1)
    stop = text[start : start + 2]  # one byte a token: two characters are at least two tokens
    work = GenerateWork(PROMPT, 30, SamplingOptions(seed=4), stop=("never this", stop), ignore_end_of_text=True)
    run = runner(work).run()
    assert run.text(0) == text[:start]
    assert (run.end(0).reason, run.end(0).stop) == ("stop", stop)
    assert run.ids(0) == plain.ids(0)[: len(run.ids(0))]
