from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from service.engine.sampling import RowSampler, sample
from service.engine.work import SamplingOptions


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def ids_of(logits: torch.Tensor, samplers: list[RowSampler]) -> list[int]:
    return [token.id for token in sample(logits, samplers)]


def draw(logits: torch.Tensor, options: SamplingOptions, n: int) -> np.ndarray:
    """How often each token comes in n draws from one row of logits."""
    sampler = RowSampler(options)
    ids = [i for _ in range(n // 50) for i in ids_of(logits.expand(50, -1), [sampler] * 50)]
    return np.bincount(ids, minlength=logits.shape[1]) / len(ids)


def test_zero_temperature_takes_the_likeliest_token() -> None:
    logits = random_logits(6, 50)
    assert ids_of(logits, [RowSampler(SamplingOptions(temperature=0))] * 6) == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 0.0), (0.7, 0, 1.0), (1.5, 5, 0.0), (1.0, 0, 0.6), (2.0, 0, 0.95), (1.3, 12, 0.8), (1.0, 1, 0.5)],
)
def test_distribution_is_that_of_transformers_warpers(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(1, 40, seed=3)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if 0 < top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(1)[0].numpy()
    n = 20_000
    found = draw(logits, SamplingOptions(temperature, top_k, top_p, seed=1), n)
    assert (found[expected == 0] == 0).all()
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / n)


def test_a_nucleus_larger_than_the_first_look() -> None:
    """Almost flat logits over many tokens: the whole vocabulary must be sorted."""
    logits = 0.01 * random_logits(2, 2000)
    samplers = [RowSampler(SamplingOptions(top_p=0.5, seed=seed)) for seed in range(100)]
    kept = {i for _ in range(30) for i in ids_of(logits[:1].expand(100, -1), samplers)}
    likeliest = logits[0].argsort(descending=True)[:1001]
    assert kept <= set(likeliest.tolist())
    assert len(kept) > 700


def test_logprobs_are_of_the_plain_logits() -> None:
    logits = random_logits(4, 30)
    sampled = sample(logits, [RowSampler(SamplingOptions(0.3, 4, 0.9, seed)) for seed in range(4)])
    expected = logits.double().log_softmax(1)[range(4), [token.id for token in sampled]]
    assert [token.logprob for token in sampled] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = random_logits(9, 60)
    options = [SamplingOptions(0.5 * (i % 4), (i % 3) * 7, (i % 2) * 0.7, seed=i) for i in range(9)]
    samplers = [RowSampler(o) for o in options]
    together = [ids_of(logits, samplers) for _ in range(5)]
    for row, option in enumerate(options):
        sampler = RowSampler(option)
        assert [ids[row] for ids in together] == [ids_of(logits[row : row + 1], [sampler])[0] for _ in range(5)]


def test_seeds_up_to_64_bits() -> None:
    logits = torch.zeros(1, 1000)
    ids = [ids_of(logits, [RowSampler(SamplingOptions(seed=seed))])[0] for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    assert len(set(ids)) == 5
    assert ids[4] == ids_of(logits, [RowSampler(SamplingOptions(seed=2**64 - 1))])[0]


def test_rows_that_are_not_finite_are_marked_and_harm_nobody() -> None:
    logits = random_logits(5, 20)
    logits[1, 3], logits[2, 0], logits[3] = float("nan"), float("inf"), float("-inf")
    for temperature in (0.0, 1.0):
        samplers = [RowSampler(SamplingOptions(temperature, 3, 0.9, seed)) for seed in range(5)]
        sampled = sample(logits, samplers)
        assert [token.finite for token in sampled] == [True, False, False, False, True]
        alone = sample(logits[4:], [RowSampler(SamplingOptions(temperature, 3, 0.9, 4))])
        assert (sampled[4].id, sampled[4].logprob) == (alone[0].id, pytest.approx(alone[0].logprob, abs=1e-6))


def test_the_smallest_temperature_is_the_likeliest_token() -> None:
    logits = random_logits(3, 30)
    options = SamplingOptions(temperature=1e-40)
    assert ids_of(logits, [RowSampler(options)] * 3) == logits.argmax(1).tolist()


def test_rounding_changes_a_token_only_where_the_number_falls_within_it() -> None:
    """What `sample` promises: noise as of another batch moves a draw only across a boundary as near as the noise."""
    generator = torch.Generator().manual_seed(5)
    logits = random_logits(400, 300, seed=6)
    noisy = logits + 1e-5 * torch.randn(logits.shape, generator=generator)
    options = [SamplingOptions(1.0, seed=seed) for seed in range(400)]
    clean = ids_of(logits, [RowSampler(option) for option in options])
    moved = ids_of(noisy, [RowSampler(option) for option in options])
    cumulative = logits.double().softmax(1).cumsum(1)
    for row, (a, b) in enumerate(zip(clean, moved, strict=True)):
        number = RowSampler(options[row]).uniform()
        distance = float((cumulative[row] - number).abs().min())
        assert a == b or distance < 1e-4
    assert sum(a != b for a, b in zip(clean, moved, strict=True)) <= 4


def test_samples_of_one_seed_have_their_own_numbers_whatever_their_count() -> None:
    options = SamplingOptions(seed=12)
    numbers = [RowSampler(options, sample).uniform() for sample in range(5)]
    assert len(set(numbers)) == 5
    assert numbers[0] == RowSampler(options).uniform()
    assert numbers[3] == RowSampler(options, 3).uniform()


# Extremes of what requests may ask for

SMALLEST, LARGEST = 1.4e-45, 3.4e38  # of positive float32 numbers


def by_the_formula(logits: torch.Tensor, options: SamplingOptions, tokens: list[int], u: float) -> set[int]:
    """The token of random number u by the definitions, from exact fractions.

    Where a cut (top k, top p) falls among equal weights, any of those above it may be meant.
    """
    scores = [float(x) for x in logits]
    for token in set(tokens):
        exact, penalty = Fraction(scores[token]), Fraction(options.repetition_penalty)
        scores[token] = float(exact * penalty if exact < 0 else exact / penalty)
    if options.temperature == 0:
        return {int(np.argmax(scores))}
    weights = np.exp((np.array(scores) - max(scores)) / options.temperature)
    order = np.argsort(-weights, kind="stable")
    kept = order[: options.top_k] if 0 < options.top_k < len(scores) else order
    if 0 < options.top_p < 1:
        before = np.cumsum(weights[kept]) - weights[kept]
        kept = kept[before < options.top_p * weights[kept].sum()]
    if len(kept) < len(scores) and weights[kept].min() in np.delete(weights, kept):
        return set(np.flatnonzero(weights >= weights[kept].min()).tolist())
    cumulative = np.cumsum(np.where(np.isin(np.arange(len(scores)), kept), weights, 0))
    return {int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))}


@pytest.mark.parametrize("logits", [[2.0, 4.0, -1.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0, -0.0], [1e38, -3e38, 3e38, 0, 1]])
@pytest.mark.parametrize("penalty", [SMALLEST, 1e-38, 0.5, 1.0, 2.0, 1e10, LARGEST])
@pytest.mark.parametrize("temperature", [0.0, SMALLEST, 1e-30, 1.0, LARGEST])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (1, 0.0), (2**32 - 1, 1.0), (0, SMALLEST), (3, 0.999_999_94)])
def test_extreme_options_mean_what_the_formula_says(
    logits: list[float], penalty: float, temperature: float, top_k: int, top_p: float
) -> None:
    """Nothing becomes infinite or NaN on the way, and no token without a weight is drawn."""
    row = torch.tensor([logits])
    for seed in range(4):
        options = SamplingOptions(temperature, top_k, top_p, seed, penalty)
        (sampled,) = sample(row, [RowSampler(options, tokens=[0, 1, 2])])
        assert sampled.finite
        assert sampled.id in by_the_formula(row[0], options, [0, 1, 2], RowSampler(options).uniform())
