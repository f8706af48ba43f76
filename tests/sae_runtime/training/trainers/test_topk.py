"""What each step of a TopK trainer keeps true, and that it learns; gradients are tested in test_gradients."""

import pytest
import torch
import torch.nn.functional as F

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.training.initialisation import encoder_scale, geometric_median, tied_directions
from sae_runtime.training.trainers.schedule import learning_rate_share
from sae_runtime.training.trainers.topk import TopKTrainer
from sae_runtime.training.trainers.trainer import StepMetrics, normalize_input
from tests.sae_runtime.training.trainers.examples import D_IN, N_LATENTS, activations, config


def test_initial_weights() -> None:
    sample = activations(2000)
    trainer = TopKTrainer(config(normalize=False), D_IN, sample)
    torch.testing.assert_close(trainer.decoder.norm(dim=1), torch.ones(N_LATENTS))
    torch.testing.assert_close(F.normalize(trainer.encoder, dim=1), trainer.decoder)
    scaled = trainer.prepare(sample)
    torch.testing.assert_close(trainer.pre_bias, geometric_median(scaled))
    assert trainer.variance == pytest.approx(float(scaled.var(0, unbiased=False).mean()), rel=1e-5)


def test_the_encoder_scale_makes_reconstructions_of_unit_length() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = tied_directions(512, 32, generator)
    scale = encoder_scale(directions, 16, generator)
    probes = F.normalize(torch.randn(2000, 32, generator=generator), dim=1)
    pre = scale * probes @ directions.T
    z = torch.zeros_like(pre).scatter_(1, pre.topk(16).indices, pre.topk(16).values.relu())
    assert (z @ directions).norm(dim=1).mean() == pytest.approx(1.0, abs=0.05)


def test_the_geometric_median_minimises_the_summed_distance() -> None:
    points = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)).exp()
    median = geometric_median(points).double().requires_grad_()
    (points.double() - median).norm(dim=1).sum().backward()  # type: ignore[no-untyped-call]
    assert median.grad is not None
    assert median.grad.norm() / len(points) < 1e-4
    outlier = torch.cat([points, torch.full((40, 3), 1e4)])
    assert (geometric_median(outlier) - median.detach()).norm() < 1.0


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_it_learns_and_keeps_the_decoder_on_the_unit_sphere(compute_dtype: str) -> None:
    trainer = TopKTrainer(config(compute_dtype=compute_dtype), D_IN, activations(4000))
    before = trainer.step(activations(1000, seed=1)).nmse
    for seed in range(2, 152):
        metrics = trainer.step(activations(64, seed=seed))
        assert metrics.l0 <= 4
    after = trainer.step(activations(1000, seed=1))
    assert after.nmse < 0.6 * before
    torch.testing.assert_close(trainer.decoder.norm(dim=1), torch.ones(N_LATENTS))


def test_dead_latents_are_counted_in_tokens_and_revived() -> None:
    def after(aux_coefficient: float) -> StepMetrics:
        trainer = TopKTrainer(config(aux_coefficient=aux_coefficient), D_IN, activations(4000))
        with torch.no_grad():
            trainer.encoder[:112] *= 0.01  # most latents start too weak to be among the k; the rest are too few
        trainer.step(activations(64, seed=1))
        assert (trainer.tokens_since_fired[:112] == 64).all()
        assert (trainer.tokens_since_fired == 0).any()
        for seed in range(2, 202):
            metrics = trainer.step(activations(64, seed=seed))
        return metrics

    without, revived = after(0.0), after(1 / 32)
    assert without.dead_fraction > 0.8
    assert revived.dead_fraction < 0.65
    assert revived.nmse < 0.8 * without.nmse


def test_the_training_forward_is_the_dictionarys() -> None:
    trainer = TopKTrainer(config(), D_IN, activations(4000))
    for seed in range(50):
        trainer.step(activations(64, seed=seed))
    dictionary = Dictionary(**trainer.export(), normalization="layer_norm")
    batch = activations(200, seed=1000)
    features = dictionary.encode(batch)
    assert features.input_statistics is not None
    mean, std = features.input_statistics.mean, features.input_statistics.std
    inside = (dictionary.decode(features) - mean) / std  # back to the space that is trained on
    nmse = F.mse_loss(inside, normalize_input(batch)) / trainer.variance
    assert trainer.step(batch).nmse == pytest.approx(float(nmse), rel=1e-4)


def test_published_weights_are_the_bias_corrected_average() -> None:
    trainer = TopKTrainer(config(ema_decay=0.9), D_IN, activations(1000))
    history = []
    for seed in range(5):
        trainer.step(activations(64, seed=seed))
        history.append(trainer.encoder.detach().clone())
    weights = torch.tensor([0.9 ** (4 - i) for i in range(5)])
    expected = (torch.stack(history) * weights[:, None, None]).sum(0) / weights.sum()
    torch.testing.assert_close(trainer.weights()["encoder"], expected)


def test_the_learning_rate_follows_its_schedule() -> None:
    settings = config(tokens=64 * 10, warmup_steps=4, decay_fraction=0.4)
    rates = [learning_rate_share(settings, step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [learning_rate_share(config(), step) for step in (0, 999)] == [1, 1]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    trainer = TopKTrainer(config(), D_IN, activations(1000))
    before = {name: p.detach().clone() for name, p in trainer.parameters().items()}
    batch = activations(64)
    batch[3, 2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0"):
        trainer.step(batch)
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters().items())


def test_constant_activations_are_an_error() -> None:
    with pytest.raises(ValueError, match="sampled activations have variance 0"):
        TopKTrainer(config(), D_IN, torch.ones(100, D_IN))
