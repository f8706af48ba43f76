"""Every family learns, publishes what it computes in training, and goes on from its state bit by bit."""

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.dictionary.dictionary import Dictionary
from sae_runtime.training.trainers import Trainer, new_trainer, penalised, restored_trainer
from sae_runtime.training.trainers.batch_topk import BatchTopKTrainer
from sae_runtime.training.trainers.matryoshka import MatryoshkaTrainer
from sae_runtime.training.trainers.penalised import PenalisedTrainer
from sae_runtime.training.trainers.schedule import SparsityWeight
from sae_runtime.training.trainers.trainer import normalize_input
from tests.sae_runtime.training.trainers.examples import D_IN, FAMILIES, N_LATENTS, activations, config, trainer

STEPS = 300


@pytest.fixture(scope="module")
def trained() -> dict[str, Trainer]:
    """Every variant after some training at equal aim: 4 of 128 latents."""
    made = {}
    for variant, settings in FAMILIES.items():
        made[variant] = trainer(4000, **settings, tokens=64 * STEPS, decay_fraction=0.3)
        for seed in range(STEPS):
            made[variant].step(activations(64, seed=seed))
    return made


def dictionary_of(trained: Trainer) -> Dictionary:
    return Dictionary(**trained.export(), normalization="layer_norm" if trained.config.normalize else "none")


def measured(dictionary: Dictionary, batch: Tensor) -> tuple[float, float]:
    """NMSE in the normalised space, and L0."""
    features = dictionary.encode(batch)
    assert features.input_statistics is not None
    mean, std = features.input_statistics.mean, features.input_statistics.std
    inside, x = (dictionary.decode(features) - mean) / std, normalize_input(batch)
    nmse = (inside - x).square().sum() / (x - x.mean(0)).square().sum()
    return float(nmse), float((features.values > 0).sum()) / len(batch)


@pytest.mark.parametrize("variant", FAMILIES)
def test_it_learns_to_reconstruct_with_about_k_latents(trained: dict[str, Trainer], variant: str) -> None:
    nmse, l0 = measured(dictionary_of(trained[variant]), activations(2000, seed=10_000))
    # The L1 penalty shrinks what it keeps; all others reconstruct well.
    assert nmse < (0.5 if FAMILIES[variant]["family"].startswith("relu") else 0.3)
    assert l0 == pytest.approx(4, abs=1.0)


@pytest.mark.parametrize("variant", FAMILIES)
def test_published_dictionaries_have_unit_decoders(trained: dict[str, Trainer], variant: str) -> None:
    dictionary = dictionary_of(trained[variant])
    torch.testing.assert_close(dictionary.decoder.norm(dim=1), torch.ones(N_LATENTS))
    assert dictionary.activation == {
        "topk": "topk",
        "batch_topk": "jumprelu",
        "matryoshka": "jumprelu",
        "relu": "relu",
        "relu_decoder_norm": "relu",
        "jumprelu": "jumprelu",
        "gated": "gated",
    }.get(trained[variant].config.family)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("variant", ["relu", "relu_decoder_norm", "jumprelu_l0", "gated"])
def test_the_training_forward_is_the_dictionarys(variant: str, normalize: bool) -> None:
    """For the families whose latents do not depend on the batch; in the units of the activations."""
    made = trainer(4000, **FAMILIES[variant], normalize=normalize)
    assert isinstance(made, PenalisedTrainer)
    for seed in range(30):
        made.step(3.0 * activations(64, seed=seed))
    batch = 3.0 * activations(200, seed=1000)
    x = made.prepare(batch)
    forward = made.forward(made._layout(x, made.level()))
    dictionary = dictionary_of(made)
    features = dictionary.encode(batch)
    decoded = dictionary.decode(features)
    if normalize:
        assert features.input_statistics is not None
        decoded = (decoded - features.input_statistics.mean) / features.input_statistics.std
    else:
        decoded = decoded / made.input_scale
    torch.testing.assert_close(decoded, forward.reconstruction.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["batch_topk", "matryoshka"])
def test_the_threshold_chooses_as_many_as_the_batch_does(trained: dict[str, Trainer], variant: str) -> None:
    made = trained[variant]
    assert isinstance(made, BatchTopKTrainer)
    batch = activations(4000, seed=5000)
    (selection,) = made.select([made.prepare(batch)])
    least = float(selection.values.min())
    assert made.threshold == pytest.approx(least, rel=0.25)
    assert len(selection.values) == 4 * 4000


def test_the_threshold_is_the_bias_corrected_average_of_least_values() -> None:
    made = trainer(**FAMILIES["batch_topk"], threshold_decay=0.9)
    assert isinstance(made, BatchTopKTrainer)
    least = []
    for seed in range(5):
        with torch.no_grad():
            x = made.prepare(activations(64, seed=seed))
            pre = F.linear(x - made.pre_bias, made.encoder, made.latent_bias)
            least.append(float(pre.flatten().topk(4 * 64).values[-1]))
        made.step(activations(64, seed=seed))
    weights = [0.9 ** (4 - i) for i in range(5)]
    expected = sum(w * v for w, v in zip(weights, least, strict=True)) / sum(weights)
    assert made.threshold == pytest.approx(expected, rel=1e-5)
    assert made.export()["threshold"] == pytest.approx(made.threshold)


def test_matryoshka_prefixes_reconstruct_alone(trained: dict[str, Trainer]) -> None:
    made, plain = trained["matryoshka"], trained["batch_topk"]
    assert isinstance(made, MatryoshkaTrainer)
    assert made.prefix_ends == [8, 16, 32, 64, 128]
    batch = activations(1000, seed=6000)

    @torch.no_grad()
    def prefix_nmse(one: Trainer) -> float:
        x = one.prepare(batch)
        pre = F.linear(x - one.pre_bias, one.encoder, one.latent_bias)
        assert isinstance(one, BatchTopKTrainer)
        z = (pre * (pre > one.threshold))[:, :32]
        error = (z @ one.decoder[:32] + one.pre_bias - x).square().sum()
        return float(error / (x - x.mean(0)).square().sum())

    assert prefix_nmse(made) < 0.8 * prefix_nmse(plain)


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_state_that_was_written_and_read_goes_on_bit_by_bit(variant: str) -> None:
    settings = config(
        **FAMILIES[variant], ema_decay=0.99, tokens=64 * 40, decay_fraction=0.5, warmup_steps=7, dead_after_tokens=256
    )
    made = new_trainer(settings, D_IN, activations(500))
    for seed in range(15):
        made.step(activations(64, seed=seed))
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    again = restored_trainer(settings, torch.load(file, weights_only=True))
    for seed in range(15, 40):
        assert made.step(activations(64, seed=seed)) == again.step(activations(64, seed=seed))
    ours, theirs = made.export(), again.export()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name], name


def test_the_sparsity_weight_is_warmed_up_when_given() -> None:
    weight = SparsityWeight(config(family="relu", sparsity_coefficient=2.0, sparsity_warmup_fraction=0.01), 1.0)
    assert [weight.at(step) for step in (0, 4, 9, 500)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    weight.observe(1e6)
    assert weight.at(500) == 2.0


def test_the_sparsity_weight_is_steered_towards_k_otherwise() -> None:
    weight = SparsityWeight(config(family="relu", k=4), 1.0)
    weight.observe(40.0)
    assert weight.at(1) > 1.0
    for _ in range(3):
        weight.observe(0.5)
    assert weight.at(4) < 1.0


def test_a_given_sparsity_coefficient_trades_error_for_sparsity() -> None:
    found = []
    for coefficient in (0.03, 1.0):
        made = trainer(4000, family="relu", sparsity_coefficient=coefficient)
        for seed in range(150):
            metrics = made.step(activations(64, seed=seed))
        found.append(metrics)
    assert found[1].l0 < 0.7 * found[0].l0
    assert found[1].nmse > found[0].nmse
    assert found[1].sparsity_weight == 1.0


def test_penalised_families_change_to_the_sparse_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalised, "MAX_SPARSE_DENSITY", 0.1)
    made: Any = trainer(4000, family="relu")

    def layout() -> str:
        return type(made._layout(made.prepare(activations(4)), made.level())).__name__

    assert layout() == "DenseLayout"  # nothing is known yet
    made.step(activations(64))
    assert layout() == "SparseLayout"


@pytest.mark.parametrize("variant", ["relu", "relu_decoder_norm", "jumprelu_l0", "jumprelu_tanh", "gated"])
def test_latents_that_nothing_activates_are_opened_until_they_fire(variant: str) -> None:
    made = trainer(4000, **FAMILIES[variant], dead_after_tokens=320)
    with torch.no_grad():
        made.latent_bias[:40] -= 4.0  # above any pre-activation
    fired = torch.zeros(40, dtype=torch.bool)
    for seed in range(250):
        bias = made.latent_bias.detach().clone()
        dead = made.dead()
        metrics = made.step(activations(64, seed=seed))
        opened = (made.latent_bias.detach() - bias)[:40]
        if seed == 4:
            assert not dead.any()
            assert (opened <= made.config.learning_rate_for(N_LATENTS) * 1.01).all()
        elif seed == 5:
            assert dead[:40].all()
            assert metrics.dead_fraction >= 40 / N_LATENTS
            assert (opened > 5 * metrics.learning_rate).all()
        fired |= made.tokens_since_fired[:40] == 0
        assert seed > 5 or not fired.any()
    assert fired.all()


def test_settings_of_other_families_are_refused() -> None:
    with pytest.raises(ValueError, match="multi_topk_coefficient belongs to the family topk, found relu"):
        config(family="relu", multi_topk_coefficient=0.1)
    with pytest.raises(ValueError, match="sparsity_coefficient belongs to relu"):
        config(sparsity_coefficient=0.1)
    with pytest.raises(ValueError, match="expected positive with sum 1"):
        config(family="matryoshka", matryoshka_fractions=(0.5, 0.1))
