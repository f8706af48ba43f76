"""`saeserve train`; the offline job itself is tested in tests/sae_runtime."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.stop_signals import TrainingStopped
from service.cli import train
from service.cli.main import _parser
from tests.sae_runtime.conftest import tiny_backbone_folder  # noqa: F401 (a fixture)

Saeserve = Callable[..., tuple[int, str, str]]


def config_of(*arguments: str) -> TrainingConfig:
    parser, _ = _parser("train")
    return train.read_config(parser.parse_args(["train", *arguments]))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump({"site": "1.resid_post_mlp", "data": ["a.txt"], "out": "d", "k": 4, "normalize": False})
    )
    return file


def test_flags_win_over_the_file(config_file: Path):
    config = config_of(
        str(config_file), "--k", "7", "--data", "b.txt", "c.txt", "--learning-rate", "1e-4", "--gradient-clip", "none"
    )
    assert (config.k, config.learning_rate, config.gradient_clip) == (7, 1e-4, None)
    assert config.data == (Path("b.txt"), Path("c.txt"))
    assert config.normalize is False
    assert config_of(str(config_file), "--normalize").normalize is True


def test_flags_alone():
    config = config_of("--site", "0.mlp_post_act", "--data", "a.txt", "--out", "d")
    assert config == TrainingConfig(site="0.mlp_post_act", data=("a.txt",), out="d")  # type: ignore[arg-type]


def test_a_preset_gives_way_to_file_and_flags(saeserve: Saeserve, config_file: Path):
    config = config_of(str(config_file), "--preset", "gpt2-paper", "--batch-tokens", "1024")
    assert (config.site, config.k, config.batch_tokens) == ("1.resid_post_mlp", 4, 1024)
    assert (config.backbone, config.n_latents, config.ema_decay) == ("gpt2", 32_768, 0.999)
    out = saeserve("train", "--help")[1]
    assert "--preset {gpt2-paper,laptop}" in out
    config_file.write_text(config_file.read_text() + "preset: desktop\n")
    assert "no preset 'desktop', expected one of gpt2-paper, laptop" in saeserve("train", str(config_file))[2]


def test_several_sites():
    config = config_of("--sites", "0.resid_pre", "1.mlp_post_act", "--data", "a.txt", "--out", "d")
    assert config.all_sites == ("0.resid_pre", "1.mlp_post_act")


def test_every_setting_has_a_flag_and_a_description(saeserve: Saeserve):
    out = saeserve("train", "--help")[1]
    for name, field in TrainingConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in out
        assert field.description
    assert "{packed,documents}" in out
    assert "--prepend-end-of-text, --no-prepend-end-of-text" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "site is not given (in the file, or as --site); data is not given (in the file, or as --data); out is not",
        ),
        (["--site", "nonsense", "--data", "a", "--out", "d"], "is not of the form <layer>.<location>"),
        (["--site", "0.resid_pre", "--data", "a", "--out", "d", "--k", "many"], "k: Input should be a valid integer"),
        (["{file}", "--k", "0"], "k: Input should be greater than or equal to 1, found '0' (from --k)"),
        (["{file}.not-there"], "cannot read settings from "),
    ],
)
def test_wrong_settings(saeserve: Saeserve, config_file: Path, arguments: list[str], message: str):
    code, out, err = saeserve("train", *(argument.replace("{file}", str(config_file)) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err


def test_unknown_settings_are_errors(saeserve: Saeserve, config_file: Path):
    config_file.write_text(config_file.read_text() + "learning_rat: 1.0\n")
    assert saeserve("train", str(config_file))[2] == f"saeserve: learning_rat: no such setting (from {config_file})\n"
    config_file.write_text("- a list")
    code, _, err = saeserve("train", str(config_file))
    assert code == 2
    assert "expected a mapping of settings" in err


def test_ctrl_c_says_where_the_checkpoint_is(
    saeserve: Saeserve, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = tmp_path / "run.pt"
    checkpoint.touch()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_training", interrupt)
    code, out, err = saeserve("train", str(config_file), "--checkpoint", str(checkpoint))
    assert (code, out) == (130, "")
    assert f"The checkpoint is {checkpoint}" in err.replace("\n", "")


def test_a_terminated_run_says_so_by_its_exit_code(
    saeserve: Saeserve, config_file: Path, monkeypatch: pytest.MonkeyPatch
):
    def terminate(*_: object) -> None:
        raise TrainingStopped(signal.SIGTERM)

    monkeypatch.setattr(train, "run_training", terminate)
    assert saeserve("train", str(config_file))[0] == 143


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_backbone_folder: Path) -> dict[str, Any]:  # noqa: F811
    """Settings of a run of a second."""
    text, held_out = tmp_path / "text.txt", tmp_path / "held_out.txt"
    words = [f"{a}{b} " for a in "bcdfgh" for b in ("at", "og", "un", "ink")]
    text.write_text("".join(words[(i * i + 3 * i) % len(words)] for i in range(2000)))
    held_out.write_text("".join(words[(i * 7 + i * i) % len(words)] for i in range(300)))
    return {
        "site": "1.resid_post_mlp",
        "data": [str(text)],
        "held_out": [str(held_out)],
        "out": str(tmp_path / "tiny"),
        "backbone": str(tiny_backbone_folder),
        "n_latents": 64,
        "tokens": 4096,
        "batch_tokens": 256,
        "buffer_tokens": 1024,
        "evaluation_tokens": 512,
        "statistics_tokens": 512,
        "compute_dtype": "float32",
        "backbone_dtype": "float32",
    }


@pytest.mark.parametrize("setting", ["data", "held_out"])
def test_a_bad_document_stops_with_one_line_or_is_skipped(
    saeserve: Saeserve, tiny_run: dict[str, Any], tmp_path: Path, setting: str
):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_run | {setting: [*tiny_run[setting], str(bad)]}))
    code, _, error = saeserve("train", str(config))
    assert code == 1
    assert error.splitlines()[-1].startswith(f"saeserve: {bad}:2: byte 0xe9 is not UTF-8")
    assert "Traceback" not in error
    with pytest.warns(UserWarning, match=f"^skipped 1 document that cannot be used: {bad}:2"):
        code, _, error = saeserve("train", str(config), "--bad-documents", "skip")
    assert code == 0, error


def test_a_name_that_is_not_utf_8_is_recorded(saeserve: Saeserve, tiny_run: dict[str, Any], tmp_path: Path):
    named = (tmp_path / "text.txt").rename(tmp_path / os.fsdecode(b"caf\xe9.txt"))
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_run | {"data": []}))
    code, _, error = saeserve("train", str(config), "--data", str(named))
    assert code == 0, error
    assert json.loads((tmp_path / "tiny" / "dictionary.json").read_text())["provenance"]["config"]["data"] == [
        "caf\ufffd.txt"
    ]


def test_trains_and_publishes(saeserve: Saeserve, tiny_run: dict[str, Any], tmp_path: Path):
    config, folder = tmp_path / "tiny.yaml", tmp_path / "tiny"
    config.write_text(yaml.safe_dump(tiny_run))
    code, out, err = saeserve("train", str(config), "--k", "4")
    assert code == 0, err
    assert out.startswith(f"Published tiny in {folder}\n")
    assert "loss_recovered" in out
    assert "train 4,096 of 4,096" in err
    published = json.loads((folder / "dictionary.json").read_text())
    assert published["k"] == 4

    code, _, err = saeserve("train", str(config), "--k", "4")
    assert code == 1
    assert f"{folder} exists" in err
