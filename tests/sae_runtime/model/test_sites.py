import itertools
import random

import pytest

from sae_runtime.model.sites import LOCATIONS, Site


def test_parse_and_str_are_inverse() -> None:
    for layer, location in itertools.product((0, 8, 11), LOCATIONS):
        site = Site.parse(f"{layer}.{location}")
        assert (site.layer, site.location) == (layer, location)
        assert str(site) == f"{layer}.{location}"


def test_sites_sort_in_order_of_computation() -> None:
    in_order = [Site(layer, location) for layer in (0, 1, 10) for location in LOCATIONS]
    shuffled = random.Random(0).sample(in_order, len(in_order))
    assert sorted(shuffled) == in_order
    assert Site(2, "resid_post_mlp") < Site(10, "resid_pre")
    assert max(Site(1, "mlp_post_act"), Site(1, "resid_post_attn")) == Site(1, "mlp_post_act")


def test_width_is_four_times_the_model_only_inside_the_mlp() -> None:
    assert {location: Site(0, location).width(768) for location in LOCATIONS} == {
        "resid_pre": 768,
        "resid_delta_attn": 768,
        "resid_post_attn": 768,
        "mlp_post_act": 3072,
        "resid_delta_mlp": 768,
        "resid_post_mlp": 768,
    }


@pytest.mark.parametrize(
    "text", ["resid_post_mlp", "8", "8.", "8.mlp", "-1.resid_pre", "8.resid_pre.x", "²", "x.y", ""]
)
def test_bad_sites_name_the_locations_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="resid_post_mlp"):
        Site.parse(text)


def test_a_negative_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="layers count from 0"):
        Site(-1, "resid_pre")
