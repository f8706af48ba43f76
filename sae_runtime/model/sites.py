"""Sites: the places inside the backbone where activations are read or edited, such as "8.resid_post_mlp"."""

from __future__ import annotations

from dataclasses import dataclass
from functools import total_ordering

LOCATIONS = ("resid_pre", "resid_delta_attn", "resid_post_attn", "mlp_post_act", "resid_delta_mlp", "resid_post_mlp")
"""Locations inside a block, in order of computation (names of openai/sparse_autoencoder).

In Hugging Face's GPT2Block: input of the block, output of `attn`, input of `ln_2`, output of `mlp.act`, output of
`mlp`, output of the block.
"""


@total_ordering
@dataclass(frozen=True)
class Site:
    """One place in the backbone. Sites compare in order of computation.

    Raises:
        ValueError: the layer is negative or the location unknown; lists the known locations.
    """

    layer: int
    """Block number, from 0."""
    location: str
    """One of LOCATIONS."""

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"site has layer {self.layer}; layers count from 0")
        if self.location not in LOCATIONS:
            raise ValueError(f"unknown location {self.location!r} in a site; expected one of {', '.join(LOCATIONS)}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Reads "<layer>.<location>".

        Raises:
            ValueError: the text has another form; lists the known locations.
        """
        layer, dot, location = text.partition(".")
        if not (dot and layer.isascii() and layer.isdigit()):
            raise ValueError(
                f"site {text!r} is not of the form <layer>.<location>, such as 8.resid_post_mlp; "
                f"locations are {', '.join(LOCATIONS)}"
            )
        return cls(int(layer), location)

    def width(self, d_model: int) -> int:
        """Size of one token's activation: 4 d_model at mlp_post_act, d_model elsewhere."""
        return 4 * d_model if self.location == "mlp_post_act" else d_model

    def __str__(self) -> str:
        return f"{self.layer}.{self.location}"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return (self.layer, LOCATIONS.index(self.location)) < (other.layer, LOCATIONS.index(other.location))
