"""The gradient of one step of every family against dense autograd in float64, written from the papers' equations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_runtime.training.trainers import Trainer, aux_k, penalised
from sae_runtime.training.trainers.penalised import PenalisedTrainer
from tests.sae_runtime.training.trainers.examples import FAMILIES, activations, perturbed


def top(values: Tensor, k: int) -> Tensor:
    """1 at the k largest of the last dimension, else 0."""
    return torch.zeros_like(values).scatter(-1, values.topk(k, dim=-1).indices, 1.0)


def expected_gradients(trainer: Trainer, batch: Tensor, dead: Tensor) -> dict[str, Tensor]:
    s, n, d = trainer.config, trainer.n_latents, trainer.d_in
    w = {name: p.detach().double().requires_grad_() for name, p in trainer.parameters().items()}
    x = trainer.prepare(batch).double()
    pre = (x - w["pre_bias"]) @ w["encoder"].T + w["latent_bias"]

    def error(z: Tensor) -> Tensor:
        return (z @ w["decoder"] + w["pre_bias"] - x).square().mean() / trainer.variance

    penalty = torch.zeros(())
    if s.family == "topk":
        z = pre.relu() * top(pre, s.k)
        loss = error(z) + s.multi_topk_coefficient * error(pre.relu() * top(pre, 4 * s.k))
    elif s.family in ("batch_topk", "matryoshka"):
        z = pre.relu() * top(pre.flatten(), s.k * len(x)).view_as(pre)
        ends = [n // 16, n // 8, n // 4, n // 2, n] if s.family == "matryoshka" else [n]
        loss = torch.stack([error(z * (torch.arange(n) < end)) for end in ends]).mean()
    elif s.family == "relu":
        z = pre.relu()
        loss, penalty = error(z), z.abs().sum(1).mean() / d**0.5
    elif s.family == "relu_decoder_norm":
        z = pre.relu()
        loss, penalty = error(z), (z * w["decoder"].norm(dim=1)).sum(1).mean() / d**0.5
    elif s.family == "jumprelu":
        theta = w["log_threshold"].exp()
        kernel = ((pre.relu() - theta).abs() / s.jumprelu_bandwidth < 0.5) & (pre > 0)
        pseudo = (kernel / s.jumprelu_bandwidth).detach() * (theta - theta.detach())
        z = pre * (pre > theta) - theta.detach() * pseudo
        step = (pre > theta).double() - pseudo
        loss = error(z)
        penalty = (step if s.jumprelu_penalty == "l0" else torch.tanh(s.tanh_scale * z)).sum(1).mean()
    else:
        magnitude = (x - w["pre_bias"]) @ (w["encoder"] * w["log_magnitude_scale"].exp()[:, None]).T
        z = (pre > 0) * (magnitude + w["magnitude_bias"]).relu()
        frozen = pre.relu() @ w["decoder"].detach() + w["pre_bias"].detach()
        loss = error(z) + (frozen - x).square().mean() / trainer.variance
        penalty = pre.relu().sum(1).mean() / d**0.5
    if isinstance(trainer, PenalisedTrainer):
        loss = loss + trainer.initial_sparsity_weight() * penalty
    if dead.any():
        # With a penalty, dead latents count without their bias.
        aux = pre - w["latent_bias"] if isinstance(trainer, PenalisedTrainer) else pre
        chosen = top(torch.where(dead, aux, -torch.inf), min(s.aux_k, int(dead.sum())))
        residual = (x - z @ w["decoder"] - w["pre_bias"]).detach()
        modelled = (aux.relu() * chosen) @ w["decoder"]
        spread = (residual - residual.mean(0)).square().mean()
        loss = loss + s.aux_coefficient * (modelled - residual).square().mean() / spread
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in w.items() if p.grad is not None}
    if trainer.unit_decoder:
        unit = w["decoder"].detach()
        gradients["decoder"] = gradients["decoder"] - (gradients["decoder"] * unit).sum(1, keepdim=True) * unit
    return gradients


def check(trainer: Trainer, batch: Tensor) -> None:
    dead = trainer.dead()
    expected = expected_gradients(trainer, batch, dead)
    metrics = trainer.step(batch)
    assert (metrics.aux_nmse > 0) == bool(dead.any())
    for name, p in trainer.parameters().items():
        assert p.grad is not None
        torch.testing.assert_close(
            p.grad.double(), expected[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert p.grad.abs().max() > 1e-5, name
    if dead.any():  # the auxiliary loss reaches dead latents, the encoder's rows and biases included
        assert trainer.encoder.grad is not None
        assert trainer.latent_bias.grad is not None
        assert trainer.encoder.grad[dead].abs().sum() > 0
        assert trainer.latent_bias.grad[dead].abs().sum() > 0


@pytest.mark.parametrize("micro_batch_tokens", [None, 24])
@pytest.mark.parametrize(("n_dead", "dense_ratio"), [(0, 16), (5, 16), (60, 16), (60, 1)])
@pytest.mark.parametrize("variant", FAMILIES)
def test_gradients_equal_dense_autograd(
    monkeypatch: pytest.MonkeyPatch, variant: str, n_dead: int, dense_ratio: int, micro_batch_tokens: int | None
) -> None:
    monkeypatch.setattr(aux_k, "DENSE_AUX_RATIO", dense_ratio)
    settings: dict[str, Any] = {**FAMILIES[variant], "micro_batch_tokens": micro_batch_tokens, "gradient_clip": None}
    check(perturbed(n_dead, **settings), activations(64, seed=1))


@pytest.mark.parametrize("variant", ["topk", "relu"])
def test_without_layer_normalisation(variant: str) -> None:
    trainer = perturbed(10, **FAMILIES[variant], normalize=False, gradient_clip=None)
    check(trainer, activations(64, seed=1))
    assert trainer.prepare(activations(2000)).square().mean() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("micro_batch_tokens", [None, 24])
@pytest.mark.parametrize("variant", ["relu", "relu_decoder_norm", "jumprelu_l0", "jumprelu_tanh", "gated"])
def test_penalised_families_with_the_sparse_layout(
    monkeypatch: pytest.MonkeyPatch, variant: str, micro_batch_tokens: int | None
) -> None:
    monkeypatch.setattr(penalised, "MAX_SPARSE_DENSITY", 1.0)
    settings: dict[str, Any] = {**FAMILIES[variant], "micro_batch_tokens": micro_batch_tokens, "gradient_clip": None}
    check(perturbed(60, **settings), activations(64, seed=1))


def test_kernels_see_something() -> None:
    """The tests above would pass without straight-through gradients if no value were near a threshold."""
    trainer = perturbed(**FAMILIES["jumprelu_l0"], gradient_clip=None)
    trainer.step(activations(64, seed=1))
    gradient = trainer.parameters()["log_threshold"].grad
    assert gradient is not None
    assert (gradient != 0).float().mean() > 0.5


@pytest.mark.parametrize("variant", FAMILIES)
def test_micro_batches_train_to_the_same_weights(variant: str) -> None:
    whole, parts = (
        perturbed(60, **FAMILIES[variant], micro_batch_tokens=size, dead_after_tokens=100_000) for size in (None, 20)
    )
    for seed in range(4):
        a, b = (t.step(activations(64, seed=seed)) for t in (whole, parts))
        assert a.l0 == b.l0
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for name, p in whole.parameters().items():
        torch.testing.assert_close(p, parts.parameters()[name], rtol=1e-3, atol=1e-5)
    assert torch.equal(whole.tokens_since_fired, parts.tokens_since_fired)


@pytest.mark.parametrize("variant", FAMILIES)
def test_half_precision_products_stay_close(variant: str) -> None:
    trainer = perturbed(60, **FAMILIES[variant], compute_dtype="bfloat16", gradient_clip=None)
    batch = activations(64, seed=1)
    expected = expected_gradients(trainer, batch, trainer.dead())
    trainer.step(batch)
    for name, p in trainer.parameters().items():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(p.grad.double().flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.97, name
