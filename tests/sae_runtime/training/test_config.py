"""Settings come from YAML and flags alike; what does not fit is named."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import sae_runtime
from sae_runtime.training.config import TrainingConfig

BUILTIN = Path(sae_runtime.__file__).parent / "builtin" / "configs"
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


@pytest.mark.parametrize("file", sorted(BUILTIN.glob("*.yaml")), ids=lambda p: p.stem)
def test_settings_of_the_builtin_dictionaries_are_valid(file: Path) -> None:
    config = TrainingConfig.from_yaml(file, data=["a.txt"], out=Path("x"))
    assert config.name == file.stem


def test_the_paper_preset_is_the_papers_recipe() -> None:
    config = TrainingConfig.from_yaml(None, preset="gpt2-paper", data=["a.txt"], out=Path("x"))
    assert (config.backbone, config.family, config.n_latents, config.k) == ("gpt2", "topk", 32_768, 32)
    assert (config.aux_k, config.aux_coefficient, config.dead_after_tokens) == (512, 1 / 32, 10_000_000)
    assert (config.batch_tokens, config.context_length, config.learning_rate_for(32_768)) == (131_072, 64, 1e-4)
    assert (config.adam_eps, config.ema_decay, config.warmup_steps, config.decay_fraction) == (6.25e-10, 0.999, 0, 0)


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("preset: laptop\nk: 16\ntokens: 5000\ndata: [a.txt]\nexpansion_factor: 4\n")
    config = TrainingConfig.from_yaml(file, out=Path("x"), k=8, sites=("0.resid_pre", "1.resid_pre"))
    assert (config.k, config.tokens, config.dead_after_tokens) == (8, 5000, 200_000)
    # The preset's site and n_latents give way to the other form of the same setting.
    assert config.all_sites == ("0.resid_pre", "1.resid_pre")
    assert config.latents_for(256) == 1024
    with pytest.raises(ValueError, match="no preset 'desktop', expected one of gpt2-paper, laptop"):
        TrainingConfig.from_yaml(file, preset="desktop")


def test_several_sites_have_folders_and_names_of_their_own() -> None:
    config = TrainingConfig(data=("a.txt",), out=Path("published/mid"), sites=("2.resid_pre", "3.resid_pre"))  # type: ignore[arg-type]
    assert [config.out_of(site) for site in config.all_sites] == [
        Path("published/mid/2.resid_pre"),
        Path("published/mid/3.resid_pre"),
    ]
    assert config.name_of("2.resid_pre") == "mid-2.resid_pre"
    with pytest.raises(ValidationError, match="expected one of the two settings"):
        TrainingConfig(**REQUIRED, sites=("3.resid_pre",))
    with pytest.raises(ValidationError, match="expected each once"):
        TrainingConfig(data=("a.txt",), out=Path("x"), sites=("2.resid_pre", "2.resid_pre"))  # type: ignore[arg-type]


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
