"""A dictionary: a sparse autoencoder over the activations of one site, for inference.

    encode   z = act(encoder (x' - pre_bias) + latent_bias),   x' = (x - mean) / (std + eps) if normalize else x
    decode   x^ = (decoder^T z + pre_bias) * std + mean,       without std and mean unless normalize

act is ReLU, or TopK: the k largest pre-activations of a row are kept, then ReLU. This is OpenAI's sparse_autoencoder
(Gao et al. 2024, section 2), whose layer normalisation has the unbiased std and adds eps = 1e-5 outside the root.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_runtime.features import InputStatistics, SparseFeatures
from sae_runtime.kernels.sparse_decode import sparse_decode
from sae_runtime.kernels.tiled_relu import tiled_relu
from sae_runtime.kernels.tiled_topk import tiled_topk
from sae_runtime.statistics import LatentStatistics

if TYPE_CHECKING:
    from sae_runtime.formats.manifest import Manifest

LAYER_NORM_EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Dictionary:
    """Weights and description of one sparse autoencoder. Immutable; every method may be called from several threads."""

    encoder: Tensor  # [n_latents, d_in]
    decoder: Tensor  # [n_latents, d_in], one row per latent; the encoder itself when tied
    pre_bias: Tensor  # [d_in], subtracted before encoding, added when decoding
    latent_bias: Tensor  # [n_latents]
    activation: Literal["topk", "relu"]
    k: int | None = None  # latents kept per row; None for "relu"
    normalize: bool = False  # layer-normalise the input (OpenAI's way), undo it when decoding
    postact: Literal["relu", "identity"] = "relu"  # after TopK; "identity" keeps negative values among the k
    site: str | None = None  # where the activations come from, for example "8.resid_post_mlp"; None if unknown
    name: str = ""
    manifest: Manifest | None = None  # of a published dictionary
    statistics: LatentStatistics | None = None

    def __post_init__(self) -> None:
        """ValueError names the tensor or field at fault, what was found and what was expected."""
        if self.encoder.ndim != 2:
            raise ValueError(f"encoder has shape {list(self.encoder.shape)}, expected [n_latents, d_in]")
        n_latents, d_in = self.encoder.shape
        expected = {"decoder": (n_latents, d_in), "pre_bias": (d_in,), "latent_bias": (n_latents,)}
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} has shape {list(found)}, expected {list(shape)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"encoder has dtype {self.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        for name in expected:
            tensor = getattr(self, name)
            if tensor.dtype != self.dtype or tensor.device != self.device:
                found_on, wanted_on = f"{tensor.dtype} on {tensor.device}", f"{self.dtype} on {self.device}"
                raise ValueError(f"{name} is {found_on}, expected {wanted_on} like the encoder")
        if self.activation not in ("topk", "relu"):
            raise ValueError(f"activation is {self.activation!r}, expected 'topk' or 'relu'")
        if self.activation == "topk" and (self.k is None or not 1 <= self.k <= n_latents):
            raise ValueError(f"k is {self.k}, expected 1 to n_latents = {n_latents}")
        if self.activation == "relu" and (self.k is not None or self.postact != "relu"):
            raise ValueError("k and postact belong to the activation 'topk'")
        if self.normalize and d_in < 2:
            raise ValueError(f"normalize needs d_in of at least 2, found {d_in}")
        if self.statistics is not None and self.statistics.n_latents != n_latents:
            raise ValueError(f"statistics are of {self.statistics.n_latents} latents, expected {n_latents}")

    @property
    def n_latents(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def tied(self) -> bool:
        return self.decoder is self.encoder

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Dictionary:
        """The same dictionary elsewhere; statistics stay float32 on the host."""
        moved = {
            name: getattr(self, name).to(device=device, dtype=dtype) for name in ("encoder", "pre_bias", "latent_bias")
        }
        decoder = moved["encoder"] if self.tied else self.decoder.to(device=device, dtype=dtype)
        return replace(self, decoder=decoder, **moved)

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseFeatures:
        """Active latents of each row of x [n, d_in] (any floating dtype).

        TopK: k columns, of which a row uses fewer if fewer of its k largest are positive. ReLU: as many columns as the
        row with the most active latents has. Neither holds more than a tile of the dense latents.
        ValueError: wrong width, or values that are not finite or overflow the dictionary's dtype.
        """
        x, statistics = self._prepare(x)
        if self.activation == "relu":
            values, indices = tiled_relu(x, self.encoder, self.latent_bias)
        else:
            assert self.k is not None
            relu = self.postact == "relu"
            values, indices = tiled_topk(x, self.encoder, self.latent_bias, self.k, relu=relu)
        self._check_overflow(values)
        return SparseFeatures(indices, values, self.n_latents, statistics)

    @torch.no_grad()
    def encode_dense(self, x: Tensor) -> Tensor:
        """All latents of each row, x [n, d_in] -> [n, n_latents]. Errors as `encode`."""
        if self.activation == "topk":
            return self.encode(x).to_dense()
        x, _ = self._prepare(x)
        z = F.linear(x, self.encoder, self.latent_bias).relu_()
        self._check_overflow(z)
        return z

    @torch.no_grad()
    def encode_features(self, x: Tensor, features: Tensor) -> Tensor:
        """Values of some latents, [n, m] for x [n, d_in] and `features` int64 [m]: columns of `encode_dense`.

        A ReLU dictionary computes only these latents; TopK must see them all to know which are kept.
        ValueError as `encode`, and for a feature outside the dictionary.
        """
        if features.numel():
            low, high = (int(bound) for bound in features.aminmax())
            if low < 0 or high >= self.n_latents:
                raise ValueError(f"feature {low if low < 0 else high} is outside 0..{self.n_latents - 1}")
        ascending, column = torch.unique(features, return_inverse=True)
        return self.encode_ascending(x, ascending)[0][:, column]

    @torch.no_grad()
    def encode_ascending(self, x: Tensor, features: Tensor) -> tuple[Tensor, InputStatistics | None]:
        """`encode_features` for valid latents in ascending order without repeats; with the input statistics.

        For callers that prepare `features` once, as edits do at every decoded token.
        """
        if self.activation == "topk":
            encoded = self.encode(x)
            return encoded.select_ascending(features), encoded.input_statistics
        x, statistics = self._prepare(x)
        z = F.linear(x, self.encoder[features], self.latent_bias[features]).relu_()
        self._check_overflow(z)
        return z, statistics

    def decode(self, features: SparseFeatures) -> Tensor:
        """Reconstruction [n, d_in] in the units of the encoder's input, in the dictionary's dtype.

        ValueError: features of another dictionary size, or without the input statistics that `normalize` needs.
        """
        if features.n_latents != self.n_latents:
            raise ValueError(f"features are of {features.n_latents} latents, the dictionary has {self.n_latents}")
        if self.normalize and features.input_statistics is None:
            raise ValueError("features lack input_statistics, which this dictionary (normalize=True) decodes with")
        x = sparse_decode(features.indices, features.values.to(self.dtype), self.decoder) + self.pre_bias
        if not self.normalize:
            return x
        statistics = features.input_statistics
        assert statistics is not None
        return torch.addcmul(statistics.mean, x.to(statistics.std.dtype), statistics.std).to(self.dtype)

    def _prepare(self, x: Tensor) -> tuple[Tensor, InputStatistics | None]:
        """Check, normalise (in float32 or better) and centre the input; returns it in the dictionary's dtype."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"activations have shape {list(x.shape)}, expected [n, {self.d_in}]")
        if not x.is_floating_point():
            raise ValueError(f"activations have dtype {x.dtype}, expected a floating dtype")
        x = x.to(device=self.device, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32)
        finite = torch.linalg.vector_norm(x, dim=1).isfinite()
        if not bool(finite.all()):
            rows = (~finite).nonzero().squeeze(1)
            # A finite row whose squares overflow would give infinite or undefined latents.
            count = f"{len(rows)} of {len(x)} rows"
            raise ValueError(f"activations are not finite, or too large, in {count}; the first is row {int(rows[0])}")
        statistics = None
        if self.normalize:
            mean = x.mean(dim=1, keepdim=True)
            x = x - mean
            std = x.std(dim=1, keepdim=True)
            x = x / (std + LAYER_NORM_EPS)
            statistics = InputStatistics(mean, std)
        x = (x - self.pre_bias).to(self.dtype)
        if self.dtype == torch.float16:  # the one dtype whose range is narrower than the input's
            self._check_overflow(x)
        return x, statistics

    def _check_overflow(self, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"the activations overflow {self.dtype} while being encoded; load the dictionary with a wider dtype"
            )
