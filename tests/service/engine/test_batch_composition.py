"""Who runs when, and in how much memory: prefill in pieces, admission by tokens, samples, compare. Counted in steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from sae_runtime.edits import Edit
from sae_runtime.model.families.gpt2.weights import random_state
from sae_runtime.model.packed import PackedTokens
from service.engine.errors import NonFiniteActivations
from service.engine.generation import LEAST_PREFILL_TOKENS, PREFILL_S, PREFILL_STEPS, PrefillPace, prompt_pieces
from service.engine.work import GenerateWork, SamplingOptions, WatchedFeatures
from tests.builders import edited_model, random_rows, small_backbone, small_dictionaries
from tests.service.engine.runner import Runner

BACKBONE = small_backbone()
DICTIONARIES = small_dictionaries()
SLOW = edited_model(BACKBONE, DICTIONARIES)
GREEDY = SamplingOptions(temperature=0)
SHORT, MEDIUM = random_rows(2, (6, 6), seed=50)
LONG = random_rows(1, (80, 80), seed=51)[0]
STEER = (Edit("mid", 3, "add", 7.0), Edit("wide", 5, "set", 4.0, positions="generated"))


def runner(*works: GenerateWork, **settings: Any) -> Runner:
    return Runner(BACKBONE, DICTIONARIES, *works, **settings)


def work(prompt: tuple[int, ...], n: int, **fields: object) -> GenerateWork:
    return GenerateWork(prompt, n, GREEDY, **({"ignore_end_of_text": True} | fields))  # type: ignore[arg-type]


class SlowDevice:
    """A backbone whose forward passes take `base_s`, and `token_s` more for each token, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base_s: float, token_s: float) -> None:
        self.now, self.passes_s = 0.0, []  # type: float, list[float]
        forward = BACKBONE.forward

        def timed(packed: PackedTokens, **kwargs: object) -> object:
            self.passes_s.append(base_s + token_s * sum(packed.lengths))
            self.now += self.passes_s[-1]
            return forward(packed, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(BACKBONE, "forward", timed)

    def clock(self) -> float:
        return self.now


class TestPrefill:
    def test_a_long_prompt_does_not_stall_a_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every step decodes one token of the stream and runs at most a piece of the prompt."""
        device = SlowDevice(monkeypatch, 0.0, PREFILL_S / 16)
        run = runner(work(SHORT, 30), prefill_chunk_tokens=16, clock=device.clock)
        run.step()
        run.join(work(LONG, 3))
        for step in range(1, 6):
            outcome = run.step()
            assert (outcome.n_rows, outcome.n_tokens) == (2, 1 + 16)
            assert len(run.ids(0)) == step + 1
        assert len(run.ids(1)) == 1  # 80 tokens in 5 pieces
        run.run()
        assert run.ids(1) == SLOW.greedy(LONG, 3)[0]

    def test_a_short_prompt_does_not_wait_for_a_long_one(self) -> None:
        run = runner(work(LONG, 3), work(SHORT, 3), prefill_chunk_tokens=16)
        run.step()
        assert (len(run.ids(0)), len(run.ids(1))) == (0, 1)
        run.run()
        assert run.ids(0) == SLOW.greedy(LONG, 3)[0]

    def test_prompts_that_arrive_together_end_one_after_the_other(self) -> None:
        """8 prompts of 80 tokens, 40 at a time: one ends every two steps, and the last when it would anyway."""
        prompts = random_rows(8, (80, 80), seed=52)
        run = runner(*(work(prompt, 16) for prompt in prompts), prefill_chunk_tokens=40)
        first_token = {}
        for step in range(1, 17):
            outcome = run.step()
            assert outcome.n_tokens <= 40 + 8
            first_token |= {i: step for i in range(8) if run.ids(i) and i not in first_token}
        assert first_token == {i: 2 * (i + 1) for i in range(8)}
        run.run()
        for i, prompt in enumerate(prompts):
            assert run.ids(i) == SLOW.greedy(prompt, 16)[0]

    def test_pieces_of_samples_and_edits_and_watched_features_are_those_of_the_whole(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        works = [
            work(LONG, 4, samples=3, edits=STEER, features=WatchedFeatures(("mid",), 3, prompt=True)),
            work(LONG[::-1], 4, edits=STEER, compare=True),
        ]
        whole = runner(*works).run()
        device = SlowDevice(monkeypatch, 0.1, 0.01)
        pieces = runner(work(SHORT, 30), *works, prefill_chunk_tokens=20, clock=device.clock).run()
        for i in range(2):
            assert pieces.ids(i + 1) == whole.ids(i)
            assert len(pieces.ends(i + 1)) == len(whole.ends(i))
        told = [
            np.concatenate([each.features["mid"].values for each in run.tokens(i).features])
            for run, i in ((pieces, 1), (whole, 0))
        ]
        np.testing.assert_allclose(told[0], told[1], atol=1e-5)

    def test_a_step_beside_streams_takes_no_longer_than_meant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """0.05 s a step and 3 ms a token: 50 tokens are 0.2 s, where all of the prompt at once were 0.29."""
        device = SlowDevice(monkeypatch, 0.05, 0.003)
        run = runner(work(SHORT, 60), clock=device.clock)
        run.step()
        sizes = []
        for _ in range(6):
            run.join(work(LONG, 1))
            while not run.ends(len(run.requests) - 1):
                sizes.append(run.step().n_tokens - 1)
        assert sizes[0] == LEAST_PREFILL_TOKENS  # nothing is known yet
        assert max(device.passes_s) == pytest.approx(PREFILL_S, rel=0.1)
        assert max(sizes) == pytest.approx(49, abs=5)

    @pytest.mark.parametrize(
        ("pending", "budget", "expected"),
        [
            ([], 5, []),
            ([3, 4], 100, [3, 4]),
            ([100, 100, 100], 20, [20, 0, 0]),
            ([100, 4, 100], 20, [16, 4, 0]),
            ([100, 50, 40], 20, [5, 0, 15]),
            ([100, 50, 7], 20, [5, 8, 7]),
            ([9, 9, 9], 2, [2, 0, 0]),
            ([9, 1, 9], 2, [1, 1, 0]),
        ],
    )
    def test_the_shortest_goes_first_and_the_oldest_goes_on(
        self, pending: list[int], budget: int, expected: list[int]
    ) -> None:
        assert prompt_pieces(pending, budget) == expected


class TestPace:
    def test_pieces_are_as_long_as_the_speed_allows(self) -> None:
        pace = PrefillPace(512)
        assert pace.budget(others_decode=False) == 512
        assert pace.budget(others_decode=True) == LEAST_PREFILL_TOKENS
        pace.note(100, 0.25)
        assert pace.budget(others_decode=True) == 400 * PREFILL_S
        assert pace.budget(others_decode=False) == 512
        pace.note(512, 0.1)
        assert pace.budget(others_decode=True) == 512  # of 552 by the mean speed

    @pytest.mark.parametrize(("base_s", "token_s"), [(0.0, 0.001), (0.05, 0.0013), (0.15, 0.001), (0.001, 0.0009)])
    def test_they_come_to_take_the_time_that_is_meant(self, base_s: float, token_s: float) -> None:
        pace = PrefillPace(512)
        for _ in range(30):
            tokens = pace.budget(others_decode=True)
            pace.note(tokens, base_s + token_s * tokens)
        assert base_s + token_s * pace.budget(others_decode=True) == pytest.approx(PREFILL_S, rel=0.03)

    def test_they_may_take_longer_where_any_step_takes_long(self) -> None:
        pace = PrefillPace(512)
        pace.note(400, 1.0)
        pace.note(0, PREFILL_S)
        assert pace.budget(others_decode=True) == pytest.approx(400 * PREFILL_STEPS * PREFILL_S)

    def test_a_few_tokens_say_nothing_of_the_speed(self) -> None:
        pace = PrefillPace(512)
        pace.note(400, 0.4)
        before = pace.budget(others_decode=True)
        pace.note(3, 0.1)
        assert pace.budget(others_decode=True) == before

    def test_a_slow_device_goes_on(self) -> None:
        pace = PrefillPace(512)
        pace.note(512, 100.0)
        assert pace.budget(others_decode=True) == LEAST_PREFILL_TOKENS


class TestCache:
    def test_a_request_waits_until_its_tokens_fit_and_is_not_overtaken(self) -> None:
        """Of 192 tokens two reservations of 64 are taken; one of 96 waits, and so does a small one behind it."""
        big = work(MEDIUM, 90)
        run = runner(work(SHORT, 20), work(SHORT, 40), big, work(SHORT, 2), max_cache_tokens=192)
        run.step()
        assert (run.running.n_active, run.running.n_waiting, len(run.waiting)) == (2, 1, 1)
        assert run.running.reserved_tokens == 128
        while not run.ends(0):
            run.step()
            assert not run.ids(2)
            assert not run.ids(3)
        run.step()
        assert (run.running.n_active, run.running.n_waiting) == (2, 1)  # the big one runs, the small one waits
        assert run.running.reserved_tokens == 64 + 96
        most = 0
        while not run.done:
            run.step()
            most = max(most, run.running.reserved_tokens)
        assert most <= 192
        assert run.running.reserved_tokens == 0
        assert run.ids(2) == SLOW.greedy(MEDIUM, 90)[0]
        assert run.ids(3) == SLOW.greedy(SHORT, 2)[0]

    def test_memory_is_bounded_by_the_setting(self) -> None:
        run = runner(work(SHORT, 2), max_cache_tokens=100, max_concurrent_generations=50).run()
        assert run.running._cache.nbytes == 100 * BACKBONE.cache_bytes_per_token

    def test_what_never_fits_is_refused_with_the_setting(self) -> None:
        generation = runner(max_cache_tokens=130, max_concurrent_generations=4).running
        generation.check_fits(work(SHORT, 40, samples=2))
        with pytest.raises(ValueError, match=r"2 sequences of 6 .* reserve 192 tokens .* max_cache_tokens = 130"):
            generation.check_fits(work(SHORT, 80, samples=2))
        with pytest.raises(ValueError, match="6 sequences cannot run together: max_concurrent_generations = 4"):
            generation.check_fits(work(SHORT, 1, samples=3, compare=True))

    def test_a_cancelled_request_frees_its_tokens_before_the_next_step(self) -> None:
        run = runner(work(LONG, 10, samples=2), work(SHORT, 3), max_cache_tokens=200)
        run.step()
        assert (run.running.n_active, run.running.n_waiting) == (2, 1)
        run.requests[0].cancelled = True
        outcome = run.step()
        assert (run.running.n_active, outcome.n_rows) == (1, 1)
        assert run.running.reserved_tokens == 64

    def test_a_cancelled_request_that_waits_for_room_makes_way(self) -> None:
        run = runner(work(LONG, 10), work(LONG, 10), work(SHORT, 2), max_cache_tokens=160)
        run.step()
        run.requests[1].cancelled = True
        run.step()
        assert run.ids(2)
        assert not run.run().ids(1)


class TestSamples:
    HOT = SamplingOptions(temperature=1.2, seed=9)

    def test_they_run_the_prompt_once_and_each_is_what_it_is_alone(self) -> None:
        many = GenerateWork(LONG, 8, self.HOT, edits=STEER, ignore_end_of_text=True, samples=4)
        run = runner(many, work(SHORT, 12))
        assert run.step().n_tokens == len(LONG) + len(SHORT)
        assert run.step().n_tokens == 4 + 1
        run.run()
        fewer = runner(replace(many, samples=2)).run()
        found = [run.tokens(0, sample).ids for sample in range(4)]
        assert found[:2] == [fewer.tokens(0, sample).ids for sample in range(2)]
        assert found[0] == runner(replace(many, samples=1)).run().ids(0)
        assert len({tuple(ids) for ids in found}) == 4
        assert [end.sample for end in run.ends(0)] == [0, 1, 2, 3]

    def test_samples_of_temperature_0_are_equal(self) -> None:
        run = runner(work(SHORT, 9, samples=3, edits=STEER)).run()
        for sample in range(3):
            assert run.tokens(0, sample).ids == SLOW.greedy(SHORT, 9, STEER)[0]

    def test_a_sample_may_end_before_the_others(self) -> None:
        """Under some seed: its slot serves the next request while the others go on."""
        for seed in range(40):
            many = GenerateWork(SHORT, 50, SamplingOptions(temperature=2.0, seed=seed), samples=3)
            run = runner(many).run()
            lengths = [end.generated_tokens for end in sorted(run.ends(0), key=lambda end: end.sample)]
            if len(set(lengths)) == 3:
                break
        assert len(set(lengths)) == 3
        for sample, n in enumerate(lengths):
            end = next(end for end in run.ends(0) if end.sample == sample)
            assert len(run.tokens(0, sample).ids) == n - (end.reason == "end_of_text")


class TestCompare:
    def test_both_run_in_the_same_batch_from_the_same_seed(self) -> None:
        hot = SamplingOptions(temperature=1.0, seed=3)
        compared = GenerateWork(SHORT, 10, hot, edits=STEER, ignore_end_of_text=True, compare=True)
        run = runner(compared)
        assert run.step().n_rows == 2
        run.run()
        alone = runner(replace(compared, compare=False), replace(compared, compare=False, edits=())).run()
        assert run.ids(0) == alone.ids(0)
        assert run.tokens(0, unedited=True).ids == alone.ids(1)
        assert sorted((end.sample, end.unedited) for end in run.ends(0)) == [(0, False), (0, True)]

    def test_edits_that_change_nothing_give_the_same_text(self) -> None:
        nothing = (Edit("mid", 3, "add", 0.0),)
        hot = SamplingOptions(temperature=1.0, seed=3)
        run = runner(GenerateWork(SHORT, 10, hot, edits=nothing, ignore_end_of_text=True, compare=True)).run()
        assert run.ids(0) == run.tokens(0, unedited=True).ids

    def test_a_request_fails_as_a_whole_and_alone(self) -> None:
        strong = (Edit("delta", 1, "set", 3e38),)
        run = runner(work(SHORT, 5, edits=strong, compare=True, samples=2), work(MEDIUM, 5), max_cache_tokens=400).run()
        errors = [event for event in run.events[run.requests[0]] if isinstance(event, Exception)]
        assert len(errors) == 1
        assert isinstance(errors[0], NonFiniteActivations)
        assert run.ids(1) == SLOW.greedy(MEDIUM, 5)[0]
        assert run.running.reserved_tokens == 0


class TestFeatures:
    @pytest.mark.parametrize("prompt_too", [True, False])
    def test_equal_those_of_a_separate_pass_over_the_whole_text(
        self, prompt_too: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forwards, forward = 0, BACKBONE.forward

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal forwards
            forwards += 1
            return forward(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(BACKBONE, "forward", counted)
        watched = WatchedFeatures(("mid", "early"), top_k=4, prompt=prompt_too)
        run = runner(
            work(LONG, 6, features=watched, samples=2), work(SHORT, 12), work(MEDIUM, 4, features=watched),
            prefill_chunk_tokens=30,
        )  # fmt: skip
        steps = 0
        while not run.done:
            run.step()
            steps += 1
        assert forwards == steps  # no second pass
        monkeypatch.undo()
        for i, prompt in ((0, LONG), (2, MEDIUM)):
            told = run.tokens(i).features
            row = (*prompt, *run.ids(i))
            positions = [each.first_position + j for each in told for j in range(len(each.ids))]
            # All but the last token, which was sampled and never run.
            assert positions == list(range(0 if prompt_too else len(prompt), len(row) - 1))
            assert [token for each in told for token in each.ids] == [row[p] for p in positions]
            for name in watched.dictionaries:
                d = DICTIONARIES[name]
                assert d.site is not None
                z = d.encode_dense(BACKBONE.activations(torch.tensor([row]), sites=[d.site])[d.site][0])
                rows = [each.features[name][j : j + 1] for each in told for j in range(len(each.ids))]
                for position, csr in zip(positions, rows, strict=True):
                    values, indices = z[position].topk(4)
                    np.testing.assert_allclose(csr.values, values[values > 0].numpy(), atol=1e-4)
                    assert csr.indices.tolist() == indices[values > 0].tolist()
        assert all(each.first_position >= len(LONG) for each in run.tokens(0, 1).features)

    def test_they_are_those_of_the_edited_model(self) -> None:
        edit = Edit("mid", 3, "set", 9.0)
        run = runner(work(SHORT, 5, edits=(edit,), features=WatchedFeatures(("mid",), 1, prompt=True))).run()
        strongest = [csr.indices.tolist() for each in run.tokens(0).features for csr in [each.features["mid"]]]
        assert all(index == 3 for indices in strongest for index in indices)


def test_logprobs_of_the_likeliest_tokens() -> None:
    run = runner(work(SHORT, 5, top_logprobs=3, edits=STEER), work(MEDIUM, 5), work(LONG, 5, top_logprobs=1)).run()
    for i, prompt, k, edits in ((0, SHORT, 3, STEER), (2, LONG, 1, ())):
        row = list(prompt)
        for token, top in zip(run.ids(i), run.tokens(i).top, strict=True):
            expected = SLOW.next_logits(row, len(prompt), edits).log_softmax(0).topk(k)
            assert [t for t, _ in top] == expected.indices.tolist()
            assert [p for _, p in top] == pytest.approx(expected.values.tolist(), abs=1e-4)
            row.append(token)
    assert run.tokens(1).top == []


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    model = GPT2LMHeadModel(BACKBONE.config).eval()
    model.load_state_dict(random_state(BACKBONE.settings, 5), strict=False)
    model.tie_weights()
    options = replace(GREEDY, repetition_penalty=penalty)
    works = [GenerateWork(p, 20, options, ignore_end_of_text=True) for p in (SHORT, MEDIUM, LONG[:20])]
    run = runner(*works, work(SHORT, 20)).run()
    for i, each in enumerate(works):
        expected = model.generate(
            torch.tensor([each.prompt]), attention_mask=torch.ones(1, len(each.prompt)), max_new_tokens=20,
            do_sample=False, eos_token_id=-1, pad_token_id=0,
            logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)]),
        )[0, len(each.prompt) :].tolist()  # fmt: skip
        assert run.ids(i) == expected
    assert run.ids(3) == SLOW.greedy(SHORT, 20)[0]
    assert run.ids(3) != run.ids(0)
