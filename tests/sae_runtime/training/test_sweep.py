"""A sweep on a tiny backbone: every run of the grid, once, and a report of what they show."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from sae_runtime import load_dictionary
from sae_runtime.training import sweep
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.sweep import run_sweep, sweep_configs

pytestmark = pytest.mark.any_cpu

N_LATENTS, K = [32, 64, 128], [2, 4]


@pytest.fixture
def base(tiny_backbone_folder: Path, tmp_path: Path) -> TrainingConfig:
    generator = random.Random(0)
    lines = [{"text": " ".join(generator.choices(("a", "small", "sweep", "of", "words"), k=40))} for _ in range(100)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TrainingConfig(
        site="1.resid_post_mlp",
        data=(tmp_path / "words.jsonl",),
        backbone=str(tiny_backbone_folder),
        out=tmp_path / "sweep",
        tokens=2_000,
        batch_tokens=128,
        backbone_tokens=512,
        buffer_tokens=1024,
        held_out_fraction=0.1,
        evaluation_tokens=500,
        statistics_tokens=500,
        aux_k=4,
        learning_rate=3e-3,
        warmup_steps=5,
        backbone_dtype="float32",
        checkpoint_interval=0,
    )


def test_every_run_is_trained_once_and_reported(base: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    result = run_sweep(base, N_LATENTS, K, begin=lambda index, total, config: begun.append((index, total)))
    assert begun == [(i, 6) for i in range(6)]
    assert [(p.n_latents, p.k) for p in result.points] == [(n, k) for n in N_LATENTS for k in K]
    for point in result.points:
        dictionary = load_dictionary(base.out / f"n{point.n_latents}-k{point.k}")
        assert (dictionary.n_latents, dictionary.k) == (point.n_latents, point.k)
        assert dictionary.manifest is not None
        assert dictionary.manifest.evaluation["nmse"] == point.loss
    assert result.fit is not None
    assert "zeta" not in result.fit.parameters
    report: dict[str, Any] = json.loads((base.out / "sweep.json").read_text())
    assert [tuple(point.values()) for point in report["points"]] == [(p.n_latents, p.k, p.loss) for p in result.points]
    assert report["fit"]["parameters"] == result.fit.parameters
    assert (base.out / "sweep.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(sweep, "run_training", lambda *_: pytest.fail("trained again"))
    assert run_sweep(base, N_LATENTS, K) == result
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        run_sweep(base.model_copy(update={"seed": 1}), N_LATENTS, K)


def test_a_grid_too_small_to_fit_still_reports(base: TrainingConfig) -> None:
    result = run_sweep(base, [32], [2])
    assert result.fit is None
    assert "1 runs" in result.reason
    assert json.loads((base.out / "sweep.json").read_text())["no_fit_because"] == result.reason


@pytest.mark.parametrize(
    ("changes", "n_latents", "message"),
    [
        ({}, [], "expected values"),
        ({}, [32, 32], "without repeats"),
        ({"family": "relu"}, [32], "relu has no k"),
        ({"site": None, "sites": ("0.resid_post_mlp",)}, [32], "of one site"),
    ],
)
def test_what_cannot_be_swept(
    base: TrainingConfig, changes: dict[str, Any], n_latents: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep_configs(base.model_copy(update=changes), n_latents, [2])


def test_the_runs_share_the_activations(base: TrainingConfig) -> None:
    configs = sweep_configs(base, N_LATENTS, K)
    assert {config.cache for config in configs} == {base.out / "activations"}
    assert len({config.out for config in configs}) == 6
