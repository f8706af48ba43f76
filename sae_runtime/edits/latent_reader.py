"""Some latents of a dictionary, read again and again, as edits do at every decoded token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_runtime.dictionary.dictionary import CHOOSING, Dictionary
from sae_runtime.dictionary.features import InputStatistics
from sae_runtime.kernels.topk_membership import kept_in_topk


class LatentReader:
    """Reads the same latents of rows after rows; what belongs to these latents alone is gathered once.

    relu, jumprelu and gated compute only these latents. topk and groupmax must look at others as well, to know which
    are kept: with `wanted` only for rows in which a wanted latent has a positive pre-activation, as elsewhere it is 0
    whichever are kept. On the CPU, where reading the encoder takes the time, topk then looks only at as much of it as
    shows that the latent is not kept.
    """

    def __init__(self, dictionary: Dictionary, features: Tensor, wanted: Tensor | None = None) -> None:
        """`features` int64 [m]: latents of the dictionary in ascending order without repeats.

        `wanted`, bool [n, m], says which values of the n rows will be looked at; others may be read as 0.
        """
        self._dictionary = dictionary
        self._features = features
        self._encoder = dictionary.encoder[features]
        self._activation = dictionary.latent_activation[features]
        self._wanted = wanted if dictionary.postact == "relu" else None
        self._on_host = (
            dictionary.activation == "topk"
            and dictionary.dtype in (torch.float32, torch.float64)
            and dictionary.device.type == "cpu"
        )
        if self._wanted is not None and self._on_host:
            self._host_wanted, self._host_features = self._wanted.numpy(), features.numpy()

    @torch.no_grad()
    def read(self, x: Tensor) -> tuple[Tensor, InputStatistics | None]:
        """Values [n, m] for x [n, d_in] as columns of `Dictionary.encode_dense`, and the input statistics.

        ValueError as `Dictionary.encode`.
        """
        dictionary = self._dictionary
        if dictionary.activation not in CHOOSING:
            prepared, statistics = dictionary.prepare(x)
            z = self._activation.before_relu(prepared, self._encoder).relu_()
            dictionary.check_overflow(z)
            return z, statistics
        if self._wanted is None:
            encoded = dictionary.encode(x)
            return encoded.select_ascending(self._features), encoded.input_statistics
        prepared, statistics = dictionary.prepare(x)
        pre = torch.addmm(self._activation.bias, prepared, self._encoder.T)
        if self._on_host:
            return self._kept(prepared, pre), statistics
        # NaN may be active: encoding in full finds the overflow.
        rows = (~(pre <= 0) & self._wanted).any(dim=1).nonzero().squeeze(1)
        if len(rows) == len(x):
            return dictionary.encode(x).select_ascending(self._features), statistics
        z = torch.zeros_like(pre)
        if len(rows):
            z[rows] = dictionary.encode(x[rows]).select_ascending(self._features)
        return z, statistics

    def _kept(self, prepared: Tensor, pre: Tensor) -> Tensor:
        """The wanted ones of the pre-activations [n, m] that are among the k largest; by NumPy, as they are few."""
        dictionary = self._dictionary
        assert dictionary.k is not None
        dictionary.check_overflow(pre)
        values = pre.numpy()
        rows, columns = ((values > 0) & self._host_wanted).nonzero()
        kept = np.zeros_like(values)
        if len(rows):
            found = values[rows, columns]
            is_kept = kept_in_topk(
                prepared[torch.from_numpy(rows)],
                dictionary.linear_encoder,
                dictionary.k,
                self._host_features[columns],
                found,
                dictionary.in_bytes,
            )
            kept[rows, columns] = found * is_kept
        return torch.from_numpy(kept)
