"""Names of published dictionaries, and what is wrong with others."""

import pytest

from sae_runtime.dictionary.pull.names import HubName, OpenAIName, parse_name

pytestmark = pytest.mark.any_cpu

OPENAI = "openai/gpt2-small/resid_post_mlp_v5_32k/8"


def test_names() -> None:
    assert parse_name(OPENAI) == OpenAIName("resid_post_mlp_v5_32k", 8)
    for location, site in (("mlp_post_act", "3.mlp_post_act"), ("resid_delta_mlp_v4", "3.resid_delta_mlp")):
        name = parse_name(f"openai/gpt2-small/{location}/3")
        assert isinstance(name, OpenAIName)
        assert name.site == site
    assert parse_name("a/b") == HubName("a/b", "main", "")
    assert parse_name("a/b@v2/c/d.e/") == HubName("a/b", "v2", "c/d.e")
    for wrong, message in (
        (
            "openai/gpt2-small/resid_post_mlp/8",
            "OpenAI published mlp_post_act, mlp_post_act_v4, .*not 'resid_post_mlp'",
        ),
        ("openai/gpt2-small/mlp_post_act/12", "layer is '12', expected 0 to 11"),
        ("just-a-name", "is not the name of a dictionary"),
        ("a/../etc", "is not the name of a dictionary"),
        ("a/b/../../c", "is not the name of a dictionary"),
        ("a/b@", "is not the name of a dictionary"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_name(wrong)
