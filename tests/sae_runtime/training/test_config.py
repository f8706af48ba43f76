"""Settings come from YAML and flags alike; what does not fit is named."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import sae_runtime
from sae_runtime.training.config import TrainingConfig

PRESETS = Path(sae_runtime.__file__).parent / "builtin" / "configs"
REQUIRED: dict[str, Any] = {"site": "2.resid_post_mlp", "data": ["a.txt"], "out": "published/mid"}


def test_yaml_and_flags_fill_the_same_object(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("site: 2.resid_post_mlp\ndata: [a.txt]\nk: 16\ntokens: 1000\n")
    config = TrainingConfig.from_yaml(file, k=8, out=Path("published/mid"))
    assert (config.k, config.tokens, config.data) == (8, 1000, (Path("a.txt"),))
    assert config.published_name == "mid"
    assert config.checkpoint_path == Path("published/mid.checkpoint.pt")


def test_every_setting_has_a_description() -> None:
    assert [name for name, field in TrainingConfig.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_are_valid(preset: Path) -> None:
    config = TrainingConfig.from_yaml(preset, data=["a.txt"], out=Path("x"))
    assert config.name == preset.stem


def test_an_unknown_key_is_an_error() -> None:
    with pytest.raises(ValidationError, match=r"latents\n.*Extra inputs"):
        TrainingConfig(**REQUIRED, latents=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "2.nowhere"}, "unknown location"),
        ({"k": 64, "n_latents": 32}, "k is 64, more than n_latents = 32"),
        ({"batch_tokens": 100, "buffer_tokens": 150}, "expected at least twice batch_tokens = 100"),
        ({"data": []}, "data"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingConfig(**{**REQUIRED, **settings})


def test_a_yaml_file_that_is_not_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text("- a\n")
    with pytest.raises(ValueError, match="found list, expected a mapping"):
        TrainingConfig.from_yaml(file)


def test_sizes_and_rates_follow_from_the_width() -> None:
    config = TrainingConfig(**REQUIRED, expansion_factor=16, k=32)
    assert config.latents_for(256) == 4096
    # Proportional to 1/√n_latents.
    assert config.learning_rate_for(4096) == pytest.approx(2 * config.learning_rate_for(16384))
    with pytest.raises(ValueError, match=r"16 latents .* fewer than k = 32"):
        config.latents_for(1)


def test_provenance_holds_no_paths() -> None:
    config = TrainingConfig(site="0.resid_pre", data=(Path("/somewhere/a.txt"),), out=Path("/somewhere/out"))
    assert "somewhere" not in str(config.provenance())
    assert config.provenance()["data"] == ["a.txt"]
