"""Dictionary against a float64 reading of the equations: every activation, normalisation, bias and skip connection."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_runtime import Backbone, Dictionary
from sae_runtime.dictionary.dictionary import find_dictionary
from sae_runtime.errors import UnknownDictionary
from sae_runtime.model.sites import Site

D_IN, N_LATENTS, K = 24, 300, 12


def make_dictionary(*, seed: int = 0, tied: bool = False, **fields: Any) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    encoder = normal(N_LATENTS, D_IN) / D_IN**0.5
    tensors = {
        "encoder": encoder,
        "decoder": encoder if tied else normal(N_LATENTS, D_IN) / D_IN**0.5,
        "pre_bias": normal(D_IN),
        "latent_bias": normal(N_LATENTS) * 0.1 - 0.5,
    }
    own = {
        "output_bias": normal(D_IN),
        "threshold": normal(N_LATENTS) + 1,  # some are negative
        "magnitude_scale": normal(N_LATENTS).exp(),
        "magnitude_bias": normal(N_LATENTS),
        "skip": normal(D_IN, D_IN) / D_IN**0.5,
    }
    fields = {"activation": "topk", "k": K} | fields
    # True stands for a tensor of the right shape.
    return Dictionary(**tensors, **{name: own[name] if value is True else value for name, value in fields.items()})


def make_input(rows: int = 40, seed: int = 1) -> Tensor:
    x = torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed)) * 3 + 2
    x[3] *= 50
    return x


def by_hand(dictionary: Dictionary, x: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Latents and reconstruction, one row at a time in float64 NumPy."""
    encoder, decoder, pre_bias, latent_bias = (
        getattr(dictionary, name).double().numpy() for name in ("encoder", "decoder", "pre_bias", "latent_bias")
    )
    optional = {
        name: getattr(dictionary, name).double().numpy()
        for name in ("output_bias", "threshold", "magnitude_scale", "magnitude_bias", "skip")
        if getattr(dictionary, name) is not None
    }
    acts, reconstructions = [], []
    for row in x.double().numpy():
        shift, scale, eps = 0.0, 1.0, 0.0
        if dictionary.normalization == "layer_norm":
            shift, scale, eps = row.mean(), row.std(ddof=1), 1e-5
        elif dictionary.normalization == "centred":
            shift = row.mean()
        elif dictionary.normalization == "constant_norm":
            scale = np.linalg.norm(row) / np.sqrt(D_IN)
        product = encoder @ ((row - shift) / (scale + eps) - pre_bias)
        z = product + latent_bias
        if dictionary.activation == "topk":
            assert dictionary.k is not None
            z[np.argsort(-z, kind="stable")[dictionary.k :]] = 0
        elif dictionary.activation == "groupmax":
            assert dictionary.k is not None
            for group in np.split(np.arange(N_LATENTS), dictionary.k):
                z[np.delete(group, np.argmax(z[group]))] = 0
        elif dictionary.activation == "jumprelu":
            z = z * (z > optional["threshold"])
        elif dictionary.activation == "gated":
            z = (z > 0) * (np.maximum(optional["magnitude_scale"] * product + optional["magnitude_bias"], 0))
        z = z if dictionary.postact == "identity" else np.maximum(z, 0)
        x_hat = (decoder.T @ z + optional.get("output_bias", pre_bias)) * scale + shift
        acts.append(z)
        reconstructions.append(x_hat + optional["skip"] @ row if "skip" in optional else x_hat)
    return np.stack(acts), np.stack(reconstructions)


KINDS = {
    "topk": {},
    "topk normalised": {"normalization": "layer_norm"},
    "topk tied": {"tied": True, "normalization": "layer_norm"},
    "topk identity": {"postact": "identity", "k": 280},
    "relu": {"activation": "relu", "k": None},
    "relu normalised, tied": {"activation": "relu", "k": None, "normalization": "layer_norm", "tied": True},
    "relu centred": {"activation": "relu", "k": None, "normalization": "centred"},
    "topk centred, skip": {"normalization": "centred", "skip": True, "output_bias": True},
    "relu constant norm": {"activation": "relu", "k": None, "normalization": "constant_norm", "output_bias": True},
    "jumprelu": {"activation": "jumprelu", "k": None, "threshold": True, "output_bias": True},
    "jumprelu normalised": {"activation": "jumprelu", "k": None, "threshold": True, "normalization": "layer_norm"},
    "gated": {"activation": "gated", "k": None, "magnitude_scale": True, "magnitude_bias": True},
    "groupmax": {"activation": "groupmax", "output_bias": True},
    "groupmax, skip": {"activation": "groupmax", "normalization": "constant_norm", "skip": True},
    "topk, skip": {"skip": True, "output_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_equations_in_float64(kind: str) -> None:
    dictionary, x = make_dictionary(**KINDS[kind]), make_input()
    acts, reconstruction = by_hand(dictionary, x)
    features = dictionary.encode(x)
    np.testing.assert_allclose(features.to_dense().numpy(), acts, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dictionary.encode_dense(x).numpy(), acts, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dictionary.decode(features).numpy(), reconstruction, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_sorted_and_padded(kind: str) -> None:
    dictionary = make_dictionary(**KINDS[kind])
    features = dictionary.encode(make_input())
    listed = features.indices >= 0
    assert features.indices.dtype == torch.int64
    assert torch.equal(features.l0, (dictionary.encode_dense(make_input()) != 0).sum(dim=1))
    assert not features.values[~listed].any()
    assert (features.values[:, :-1] >= features.values[:, 1:])[listed[:, 1:]].all()
    assert (features.input_statistics is not None) == dictionary.normalizes_input
    if dictionary.activation not in ("topk", "groupmax"):
        assert features.indices.shape[1] == int(features.l0.max())


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_features_are_columns_of_the_dense_latents(kind: str) -> None:
    dictionary, x = make_dictionary(**KINDS[kind]), make_input()
    columns = torch.tensor([7, 299, 0, 7])
    chosen = dictionary.encode_features(x, columns)
    torch.testing.assert_close(chosen, dictionary.encode_dense(x)[:, columns], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"latent 300 is outside 0\.\.299"):
        dictionary.encode_features(x, torch.tensor([1, 300]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_latents_moves_the_reconstruction_along_decoder_rows(kind: str) -> None:
    """What edits rely on: decode(f') - decode(f) = std * sum (z' - z) d_f in every family."""
    dictionary, x = make_dictionary(**KINDS[kind]).to(dtype=torch.float64), make_input().double()
    features = dictionary.encode(x)
    change = torch.randn(features.values.shape, generator=torch.Generator().manual_seed(4)).double()
    change *= features.indices >= 0
    changed = dictionary.decode(replace(features, values=features.values + change))
    dense = torch.zeros(len(x), N_LATENTS).double().scatter_add_(1, features.indices.clamp_min(0), change)
    statistics = features.input_statistics
    scale = 1 if statistics is None else statistics.std
    expected = dictionary.decode(features) + dense @ dictionary.decoder * scale
    torch.testing.assert_close(changed, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("kind", ["topk normalised", "relu", "gated", "topk, skip"])
def test_half_precision_reconstructs_alike(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    dictionary, x = make_dictionary(**KINDS[kind]), make_input()
    half = dictionary.to(dtype=dtype)
    features = half.encode(x)
    assert features.values.dtype == half.decode(features).dtype == dtype
    expected = dictionary.decode(dictionary.encode(x))
    error = (half.decode(features).float() - expected).norm(dim=1) / expected.norm(dim=1)
    # In a few rows rounding swaps the k-th latent for the next one.
    assert (error < tolerance).float().mean() >= (0.9 if dictionary.activation == "topk" else 1)
    assert half.encode(x.to(dtype)).l0.shape == (40,)  # inputs may be of any floating dtype


def test_float64_is_exact_to_float64() -> None:
    dictionary, x = make_dictionary(normalization="layer_norm").to(dtype=torch.float64), make_input().double()
    acts, reconstruction = by_hand(dictionary, x)
    np.testing.assert_allclose(dictionary.encode_dense(x).numpy(), acts, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dictionary.decode(dictionary.encode(x)).numpy(), reconstruction, rtol=1e-11, atol=1e-11)


def test_a_row_does_not_depend_on_its_batch() -> None:
    dictionary, x = make_dictionary(normalization="layer_norm"), make_input()
    together = dictionary.encode(x)
    for row in range(len(x)):
        alone = dictionary.encode(x[row : row + 1])
        assert torch.equal(alone.indices, together[row : row + 1].indices)
        torch.testing.assert_close(alone.values, together[row : row + 1].values, rtol=1e-5, atol=1e-5)


def test_constant_row_normalises_to_zero() -> None:
    dictionary = make_dictionary(normalization="layer_norm")
    features = dictionary.encode(torch.full((1, D_IN), 0.75))
    assert features.input_statistics is not None
    assert features.input_statistics.std.item() == 0
    assert torch.equal(dictionary.decode(features), torch.full((1, D_IN), 0.75))


def test_row_without_length_stays_zero_under_constant_norm() -> None:
    """SAELens divides by the norm and gives NaN; here the row is encoded as zero and decodes to zero."""
    dictionary = make_dictionary(**KINDS["relu constant norm"])
    features = dictionary.encode(torch.cat([torch.zeros(1, D_IN), torch.full((1, D_IN), 1e-30)]))
    expected = (dictionary.latent_bias - dictionary.encoder @ dictionary.pre_bias).relu()
    torch.testing.assert_close(features.to_dense(), expected.expand(2, -1), rtol=1e-5, atol=1e-5)
    assert not dictionary.decode(features).any()


def test_skip_input_is_the_input_as_it_was() -> None:
    dictionary, x = make_dictionary(skip=True), make_input()
    features = dictionary.encode(x)
    expected = dictionary.decode(features)
    x.zero_()
    assert torch.equal(dictionary.decode(features), expected)
    torch.testing.assert_close(dictionary.decode(features[3:5]), expected[3:5], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="lack skip_input"):
        dictionary.decode(replace(features, skip_input=None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("kind", ["topk normalised", "relu", "relu centred"])
def test_non_finite_input_is_refused_with_the_row(kind: str, bad: float) -> None:
    dictionary, x = make_dictionary(**KINDS[kind]), make_input()
    x[4, 2] = x[9, 0] = bad
    for method in (dictionary.encode, dictionary.encode_dense):
        with pytest.raises(ValueError, match="2 of 40 rows; the first is row 4"):
            method(x)
    with pytest.raises(ValueError, match="first is row 4"):
        dictionary.encode_features(x, torch.tensor([0]))


def test_overflow_of_a_narrow_dtype_is_refused() -> None:
    dictionary = make_dictionary().to(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"overflow torch\.float16"):
        dictionary.encode(make_input() * 1e5)


def test_wrong_inputs_are_named() -> None:
    dictionary = make_dictionary(normalization="layer_norm")
    with pytest.raises(ValueError, match=r"shape \[5, 23\], expected \[n, 24\]"):
        dictionary.encode(torch.zeros(5, 23))
    with pytest.raises(ValueError, match=r"torch.int64, expected a floating dtype"):
        dictionary.encode(torch.zeros(5, 24, dtype=torch.int64))
    features = dictionary.encode(make_input())
    with pytest.raises(ValueError, match="lack input_statistics"):
        dictionary.decode(replace(features, input_statistics=None))
    with pytest.raises(ValueError, match="299 latents, the dictionary has 300"):
        dictionary.decode(replace(features, n_latents=299))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": torch.zeros(D_IN, N_LATENTS)}, r"decoder has shape \[24, 300\], expected \[300, 24\]"),
        ({"latent_bias": torch.zeros(299)}, r"latent_bias has shape \[299\], expected \[300\]"),
        ({"pre_bias": torch.zeros(D_IN).double()}, "pre_bias is torch.float64 on cpu, expected torch.float32"),
        ({"encoder": torch.zeros(0, D_IN)}, r"encoder has shape \[0, 24\], expected \[n_latents, d_in\] of 1 or more"),
        ({"encoder": torch.zeros(N_LATENTS, 0)}, r"encoder has shape \[300, 0\], expected"),
        ({"k": 301}, "k is 301, expected 1 to n_latents = 300"),
        ({"k": None}, "k is None"),
        ({"activation": "relu"}, "k is 12, but it belongs to the activations topk and groupmax"),
        ({"activation": "relu", "k": None, "postact": "identity"}, "postact is 'identity', but only the activation"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"activation": "jumprelu", "k": None}, "'jumprelu' and lacks threshold"),
        ({"activation": "gated", "k": None}, "'gated' and lacks magnitude_scale"),
        ({"threshold": torch.zeros(N_LATENTS)}, "'topk' and has threshold, which 'jumprelu' needs"),
        ({"activation": "groupmax", "k": 7}, "k is 7, expected a divisor of n_latents = 300"),
        ({"skip": torch.zeros(D_IN, 1)}, r"skip has shape \[24, 1\], expected \[24, 24\]"),
        ({"output_bias": torch.zeros(1)}, r"output_bias has shape \[1\], expected \[24\]"),
        ({"normalization": True}, "normalization is True, expected one of none, centred, layer_norm, constant_norm"),
    ],
)
def test_inconsistent_dictionaries_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_dictionary(), **change)


def test_tied_weights_stay_one_tensor() -> None:
    tied = make_dictionary(tied=True).to(dtype=torch.bfloat16)
    assert tied.tied
    assert tied.decoder.data_ptr() == tied.encoder.data_ptr()
    assert not make_dictionary().tied


def test_concurrent_calls_do_not_mix_normalisation() -> None:
    """Rows of very different mean and scale per thread; any shared state would show in the reconstructions."""
    dictionary = make_dictionary(normalization="layer_norm")
    inputs = [make_input(rows=8, seed=seed) * 10.0 ** (seed % 5) + 100 * seed for seed in range(16)]
    expected = [dictionary.decode(dictionary.encode(x)) for x in inputs]

    def many_times(job: int) -> bool:
        # Encode another input in between: the features must carry all that decoding needs.
        features = dictionary.encode(inputs[job])
        dictionary.encode(inputs[(job + 1) % 16])
        return torch.equal(dictionary.decode(features), expected[job])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many_times, list(range(16)) * 20))


def test_decode_passes_gradients_to_values() -> None:
    dictionary = make_dictionary(normalization="layer_norm")
    features = dictionary.encode(make_input())
    values = features.values.clone().requires_grad_()
    dictionary.decode(replace(features, values=values)).sum().backward()
    assert values.grad is not None
    assert values.grad.abs().sum() > 0


def test_the_site_in_a_backbone() -> None:
    backbone = Backbone.random(n_layers=2, d_model=16, n_heads=2)
    dictionary = replace(make_dictionary(), name="d", site="1.resid_pre")
    assert dictionary.require_site() == Site(1, "resid_pre")
    wide = Backbone.random(n_layers=2, d_model=dictionary.d_in, n_heads=2)
    assert dictionary.site_in(wide) == Site(1, "resid_pre")
    assert dictionary.site_in(wide, "0.resid_pre") == Site(0, "resid_pre")
    with pytest.raises(ValueError, match=rf"dictionary 'd' reads {dictionary.d_in} values per token, site 1.* has 16"):
        dictionary.site_in(backbone)
    with pytest.raises(ValueError, match="layers 0 to 1"):
        dictionary.site_in(wide, "2.resid_pre")
    with pytest.raises(ValueError, match="dictionary 'd' does not say which site it reads; give one"):
        replace(dictionary, site=None).site_in(wide)


def test_latents_that_it_has() -> None:
    dictionary = make_dictionary()
    dictionary.check_latents([])
    dictionary.check_latents([0, 299])
    for latents in ([0, 300], torch.tensor([-1, 4])):
        with pytest.raises(ValueError, match=r"latent (300|-1) is outside 0\.\.299 of the dictionary"):
            dictionary.check_latents(latents)


def test_dictionaries_by_name() -> None:
    dictionaries = {"b": make_dictionary(), "a": make_dictionary()}
    assert find_dictionary("b", dictionaries) is dictionaries["b"]
    with pytest.raises(UnknownDictionary, match="no dictionary 'c'; loaded: a, b"):
        find_dictionary("c", dictionaries)
    with pytest.raises(UnknownDictionary, match="loaded: none"):
        find_dictionary("c", {})
