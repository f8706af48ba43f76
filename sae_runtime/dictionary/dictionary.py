"""A dictionary: a sparse autoencoder over the activations of one site, for inference.

    encode   z = act(encoder (x' - pre_bias) + latent_bias),   x' the normalised input (`normalization`)
    decode   x^ = mean + std * (decoder^T z + output_bias) + skip x,   mean, std as the normalisation took them out

output_bias is pre_bias unless given, skip is absent unless given. act is one of

    topk      the k largest pre-activations of a row are kept, then ReLU (unless postact is "identity")
    groupmax  latents are cut into k runs of neighbours, the largest of each run is kept, then ReLU
    relu, jumprelu, gated   each latent alone, see `LatentActivation`

With topk, layer_norm and one bias this is OpenAI's sparse_autoencoder (Gao et al. 2024, section 2). A training family
is served in its inference form: BatchTopK and Matryoshka as jumprelu with their learned threshold, and a factor on
latents (SAELens' rescale_acts_by_decoder_norm) is multiplied into the encoder and divided out of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from sae_runtime.dictionary.features import InputStatistics, SparseFeatures, all_finite
from sae_runtime.dictionary.fingerprint import fingerprint_of
from sae_runtime.dictionary.normalization import NORMALIZATIONS, Normalization, normalize_rows, restore_rows
from sae_runtime.dictionary.statistics import LatentStatistics
from sae_runtime.errors import UnknownDictionary
from sae_runtime.kernels.active import LatentActivation, tiled_active
from sae_runtime.kernels.decode import sparse_decode
from sae_runtime.kernels.groupmax import tiled_groupmax
from sae_runtime.kernels.screened_topk import Screen, can_screen, screened_topk, screening_is_fast
from sae_runtime.kernels.topk import tiled_topk
from sae_runtime.model.sites import Site

if TYPE_CHECKING:
    from sae_runtime.dictionary.formats.origin import Origin
    from sae_runtime.dictionary.manifest import Manifest
    from sae_runtime.model.backbone import Backbone

Activation = Literal["topk", "relu", "jumprelu", "gated", "groupmax"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
COMPETING = ("topk", "groupmax")  # a latent's value depends on the other latents of its row
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Tensors that a dictionary may have besides encoder, decoder, pre_bias and latent_bias; and whose they are.
OPTIONAL_TENSORS = ("output_bias", "threshold", "magnitude_scale", "magnitude_bias", "skip")
_OF_ACTIVATION = {"threshold": "jumprelu", "magnitude_scale": "gated", "magnitude_bias": "gated"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Dictionary:
    """Weights and description of one sparse autoencoder. Immutable; every method may be called from several threads."""

    encoder: Tensor  # [n_latents, d_in]
    decoder: Tensor  # [n_latents, d_in], one row per latent; the encoder itself when tied
    pre_bias: Tensor  # [d_in], subtracted before encoding (zeros: nothing is); added when decoding without output_bias
    latent_bias: Tensor  # [n_latents]; of "gated" the bias of the gate
    activation: Activation
    k: int | None = None  # latents kept per row at most, of "topk" and "groupmax"; else None
    normalization: Normalization = "none"  # of each input row, undone when decoding
    postact: Literal["relu", "identity"] = "relu"  # after "topk"; "identity" keeps negative values among the k
    output_bias: Tensor | None = None  # [d_in], added when decoding; None: pre_bias is
    threshold: Tensor | None = None  # [n_latents], of "jumprelu": pre-activations above it pass, negative ones act as 0
    magnitude_scale: Tensor | None = None  # [n_latents], of "gated": exp(r_mag)
    magnitude_bias: Tensor | None = None  # [n_latents], of "gated"
    skip: Tensor | None = None  # [d_in, d_in], output by input: the reconstruction gets skip @ x of the raw input
    transcoder: bool = False  # decodes to another activation than it reads; then edits and errors at its site are void
    site: str | None = None  # where the activations come from, for example "8.resid_post_mlp"; None if unknown
    name: str = ""
    manifest: Manifest | None = None  # of a published dictionary
    origin: Origin | None = None  # of a file of another project: what it says beyond the weights
    statistics: LatentStatistics | None = None
    folder: Path | None = None  # that it was read from, where its catalogue may lie
    screen: Screen | None = None  # see `with_fast_encoder`

    def __post_init__(self) -> None:
        """ValueError names the tensor or field at fault, what was found and what was expected."""
        if self.encoder.ndim != 2:
            raise ValueError(f"encoder has shape {list(self.encoder.shape)}, expected [n_latents, d_in]")
        n_latents, d_in = self.encoder.shape
        per_latent = ("latent_bias", "threshold", "magnitude_scale", "magnitude_bias")
        expected: dict[str, tuple[int, ...]] = {"decoder": (n_latents, d_in), "skip": (d_in, d_in)}
        expected |= dict.fromkeys(("pre_bias", "output_bias"), (d_in,)) | dict.fromkeys(per_latent, (n_latents,))
        tensors = {name: tensor for name in expected if (tensor := getattr(self, name)) is not None}
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}")
        if self.dtype not in DTYPES:
            raise ValueError(f"encoder has dtype {self.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        for name, tensor in tensors.items():
            if tensor.dtype != self.dtype or tensor.device != self.device:
                found_on, wanted_on = f"{tensor.dtype} on {tensor.device}", f"{self.dtype} on {self.device}"
                raise ValueError(f"{name} is {found_on}, expected {wanted_on} like the encoder")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        for name, activation in _OF_ACTIVATION.items():
            if (name in tensors) != (self.activation == activation):
                lack = "lacks" if self.activation == activation else "has"
                raise ValueError(f"the activation is {self.activation!r} and {lack} {name}, which {activation!r} needs")
        if self.activation in COMPETING and (self.k is None or not 1 <= self.k <= n_latents):
            raise ValueError(f"k is {self.k}, expected 1 to n_latents = {n_latents}")
        if self.activation == "groupmax" and n_latents % (self.k or 1):
            raise ValueError(f"k is {self.k}, expected a divisor of n_latents = {n_latents} for groupmax")
        if self.activation not in COMPETING and self.k is not None:
            raise ValueError(f"k is {self.k}, but it belongs to the activations {' and '.join(COMPETING)}")
        if self.activation != "topk" and self.postact != "relu":
            raise ValueError(f"postact is {self.postact!r}, but only the activation 'topk' has another than 'relu'")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization is {self.normalization!r}, expected one of {', '.join(NORMALIZATIONS)}")
        if self.normalization == "layer_norm" and d_in < 2:
            raise ValueError(f"layer_norm needs d_in of at least 2, found {d_in}")
        if self.statistics is not None and self.statistics.n_latents != n_latents:
            raise ValueError(f"statistics are of {self.statistics.n_latents} latents, expected {n_latents}")

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of`. The first use may take seconds, if the dictionary is large and not published."""
        return fingerprint_of(self)

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

    @property
    def normalizes_input(self) -> bool:
        """Whether decoding needs the `InputStatistics` that encoding returns."""
        return self.normalization != "none"

    def require_site(self) -> Site:
        """The site that the dictionary reads. ValueError: it does not say."""
        if self.site is None:
            hook = None if self.origin is None else self.origin.hook
            called = f" (the file calls it {hook!r})" if hook else ""
            raise ValueError(f"{self} does not say which site it reads{called}; give one, such as 8.resid_post_mlp")
        return Site.parse(self.site)

    def site_in(self, backbone: Backbone, site: Site | str | None = None) -> Site:
        """The site of a backbone that the dictionary reads: its own unless another is given.

        ValueError: no site is known, or the backbone lacks it or has it with another width.
        """
        site = backbone.check_site(self.require_site() if site is None else site)
        if (width := backbone.site_width(site)) != self.d_in:
            raise ValueError(
                f"{self} reads {self.d_in} values per token, site {site} of backbone {backbone.name!r} has {width}"
            )
        return site

    def check_latents(self, latents: Tensor | Sequence[int]) -> None:
        """ValueError unless the dictionary has all of these latents."""
        numbers = torch.as_tensor(latents, dtype=torch.int64)
        if numbers.numel():
            low, high = (int(bound) for bound in numbers.aminmax())
            if low < 0 or high >= self.n_latents:
                raise ValueError(f"latent {low if low < 0 else high} is outside 0..{self.n_latents - 1} of {self}")

    def __str__(self) -> str:
        return f"dictionary {self.name!r}" if self.name else "the dictionary"

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Dictionary:
        """The same dictionary elsewhere; statistics stay float32 on the host."""
        names = ("encoder", "decoder", "pre_bias", "latent_bias", *OPTIONAL_TENSORS)
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        moved = {
            name: tensor.to(device=device, dtype=dtype)
            for name, tensor in tensors.items()
            if not (self.tied and name == "decoder")
        }
        return replace(self, **({"screen": None, "decoder": moved["encoder"]} | moved))

    def with_fast_encoder(self) -> Dictionary:
        """The same dictionary with a bfloat16 copy of the encoder, by which the exact float32 top-k is found faster.

        For "topk" in float32 on a CPU with bfloat16 matrix units (AMX), see kernels/screened_topk.py; the copy takes
        half of the encoder's memory. Elsewhere the dictionary itself is returned. `to` leaves the copy behind.
        """
        if self.activation != "topk" or self.dtype != torch.float32 or self.device.type != "cpu":
            return self
        return replace(self, screen=Screen.of(self.encoder, self.latent_bias)) if screening_is_fast() else self

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseFeatures:
        """Active latents of each row of x [n, d_in] (any floating dtype).

        topk, groupmax: k columns, of which a row uses fewer if fewer of the k are positive. The others: as many columns
        as the row with the most active latents has. None holds more than a tile of the dense latents.
        ValueError: wrong width, or values that are not finite or overflow the dictionary's dtype.
        """
        raw = x
        x, statistics = self.prepare(x)
        if self.activation == "topk":
            assert self.k is not None
            relu = self.postact == "relu"
            if self.screen is not None and can_screen(x, self.n_latents, self.k):
                values, indices = screened_topk(x, self.encoder, self.latent_bias, self.screen, self.k, relu=relu)
            else:
                values, indices = tiled_topk(x, self.encoder, self.latent_bias, self.k, relu=relu)
        elif self.activation == "groupmax":
            assert self.k is not None
            values, indices = tiled_groupmax(x, self.encoder, self.latent_bias, self.k)
        else:
            values, indices = tiled_active(x, self.encoder, self.latent_activation)
        self.check_overflow(values)
        # A copy, because the caller may change its activations in place before it decodes.
        skip_input = None if self.skip is None else raw.to(device=self.device, dtype=self.dtype, copy=True)
        return SparseFeatures(indices, values, self.n_latents, statistics, skip_input)

    @torch.no_grad()
    def encode_dense(self, x: Tensor) -> Tensor:
        """All latents of each row, x [n, d_in] -> [n, n_latents]. Errors as `encode`."""
        if self.activation in COMPETING:
            return self.encode(x).to_dense()
        x, _ = self.prepare(x)
        z = self.latent_activation.before_relu(x, self.encoder).relu_()
        self.check_overflow(z)
        return z

    @torch.no_grad()
    def encode_features(self, x: Tensor, features: Tensor) -> Tensor:
        """Values of some latents, [n, m] for x [n, d_in] and `features` int64 [m]: columns of `encode_dense`.

        relu, jumprelu and gated compute only these latents; topk and groupmax must see all to know which are kept.
        ValueError as `encode`, and for a feature outside the dictionary.
        """
        self.check_latents(features)
        if self.activation in COMPETING:
            return self.encode(x).select(features)
        x, _ = self.prepare(x)
        z = self.latent_activation[features].before_relu(x, self.encoder[features]).relu_()
        self.check_overflow(z)
        return z

    def decode(self, features: SparseFeatures) -> Tensor:
        """Reconstruction [n, d_in] in the units of the encoder's input, in the dictionary's dtype.

        It is affine in the latents: decode(f') - decode(f) = std * sum (z' - z) d_f with d_f the rows of `decoder` and
        std of the input statistics (1 without them), whatever the biases and the skip connection.
        ValueError: features of another dictionary size, or without what the normalisation or the skip connection needs.
        """
        if features.n_latents != self.n_latents:
            raise ValueError(f"features are of {features.n_latents} latents, the dictionary has {self.n_latents}")
        statistics, skip_input = features.input_statistics, features.skip_input
        if self.normalizes_input and statistics is None:
            raise ValueError(
                f"features lack input_statistics, which this dictionary ({self.normalization}) decodes with"
            )
        if self.skip is not None and skip_input is None:
            raise ValueError("features lack skip_input, which this dictionary with a skip connection decodes with")
        bias = self.pre_bias if self.output_bias is None else self.output_bias
        x = sparse_decode(features.indices, features.values.to(self.dtype), self.decoder) + bias
        if self.normalizes_input:
            assert statistics is not None
            x = restore_rows(x, statistics).to(self.dtype)
        if self.skip is not None:
            assert skip_input is not None
            x = torch.addmm(x, skip_input, self.skip.T)
        return x

    @property
    def latent_activation(self) -> LatentActivation:
        return LatentActivation(self.latent_bias, self.threshold, self.magnitude_scale, self.magnitude_bias)

    def prepare(self, x: Tensor) -> tuple[Tensor, InputStatistics | None]:
        """Check, normalise (in float32 or better) and centre the input; returns it in the dictionary's dtype."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"activations have shape {list(x.shape)}, expected [n, {self.d_in}]")
        if not x.is_floating_point():
            raise ValueError(f"activations have dtype {x.dtype}, expected a floating dtype")
        x = x.to(device=self.device, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32)
        x, statistics = normalize_rows(x, self.normalization)
        # A finite row whose squares overflow would give infinite or undefined latents.
        size = torch.linalg.vector_norm(x, dim=1) if statistics is None else statistics.std
        if not all_finite(size):
            rows = (~size.flatten().isfinite()).nonzero().squeeze(1)
            count = f"{len(rows)} of {len(x)} rows"
            raise ValueError(f"activations are not finite, or too large, in {count}; the first is row {int(rows[0])}")
        x = (x - self.pre_bias).to(self.dtype)
        if self.dtype == torch.float16:  # the one dtype whose range is narrower than the input's
            self.check_overflow(x)
        return x, statistics

    def check_overflow(self, values: Tensor) -> None:
        if not all_finite(values):
            raise ValueError(
                f"the activations overflow {self.dtype} while being encoded; load the dictionary with a wider dtype"
            )


def find_dictionary(name: str, dictionaries: Mapping[str, Dictionary]) -> Dictionary:
    """The dictionary of that name. UnknownDictionary: there is none; the message tells which there are."""
    dictionary = dictionaries.get(name)
    if dictionary is None:
        raise UnknownDictionary(f"no dictionary {name!r}; loaded: {', '.join(sorted(dictionaries)) or 'none'}")
    return dictionary
