"""Whole runs on a tiny backbone: reproducible, resumable, published, and clear about what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_runtime import Backbone, load_dictionary
from sae_runtime.figures.held_out import held_out_figures
from sae_runtime.kernels.products import default_compute_dtype
from sae_runtime.progress import Progress
from sae_runtime.training import worker
from sae_runtime.training.activations.run_rows import held_out_rows
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.run import run_training
from tests.sae_runtime.training.trainers.examples import FAMILIES


@pytest.fixture
def settings(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    more = {"tokens": 12_000, "evaluation_tokens": 1500, "statistics_tokens": 2000, "dead_after_tokens": 2000}
    return tiny_settings | more


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: value for n, value in vars(load_dictionary(folder)).items() if isinstance(value, torch.Tensor)}


def assert_bit_equal(a: Path, b: Path) -> None:
    for name, tensor in stored_weights(a).items():
        assert torch.equal(tensor, stored_weights(b)[name]), name


def interrupt_at(tokens: int) -> Callable[[Progress], None]:
    def callback(event: Progress) -> None:
        if event.stage == "train" and event.done >= tokens:
            raise KeyboardInterrupt

    return callback


@pytest.fixture
def _every_step_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_runtime.progress.INTERVAL", 0.0)


def test_it_publishes_a_dictionary_that_loads_with_figures_that_recompute(settings: dict[str, Any]) -> None:
    events: list[Progress] = []
    config = TrainingConfig(**settings)
    (result,) = run_training(config, events.append)
    assert list(dict.fromkeys(e.stage for e in events)) == ["prepare", "train", "statistics", "evaluate", "publish"]
    assert events[-1].done == events[-1].total
    trained = [e for e in events if e.stage == "train" and "nmse" in e.figures]
    assert trained[-1].done == 12_032  # rounded up to whole batches
    assert 0 < trained[-1].figures["l0"] <= 8

    backbone = Backbone.load(config.backbone)
    dictionary = load_dictionary(config.out, backbone=backbone)
    assert (dictionary.name, dictionary.site, dictionary.n_latents, dictionary.k) == ("tiny", "1.resid_post_mlp", 64, 8)
    assert dictionary.statistics is not None
    assert dictionary.statistics.n_tokens >= 2000
    manifest = dictionary.manifest
    assert manifest is not None
    assert manifest.evaluation == result.manifest.evaluation
    assert manifest.provenance.tokens == 12_032
    assert manifest.context_length == 32
    again = held_out_figures(backbone, dictionary, held_out_rows(config, backbone, config.evaluation_tokens))
    assert again == pytest.approx(manifest.evaluation, rel=1e-5)
    assert again["nmse"] < 0.6
    assert "| NMSE |" in (config.out / "CARD.md").read_text()
    assert not config.checkpoint_path.exists()


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(settings: dict[str, Any]) -> None:
    folders = [settings["out"].with_name(name) for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (7, 7, 8), strict=True):
        run_training(TrainingConfig(**{**settings, "out": folder, "seed": seed, "tokens": 4000}))
    assert_bit_equal(folders[0], folders[1])
    assert not torch.equal(stored_weights(folders[0])["encoder"], stored_weights(folders[2])["encoder"])


@pytest.mark.usefixtures("_every_step_reports")
@pytest.mark.parametrize(
    "extra",
    [*FAMILIES.values(), {"rows": "documents", "prepend_end_of_text": True, "ema_decay": 0.99}],
    ids=[*FAMILIES, "documents, averaged"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(settings: dict[str, Any], extra: dict[str, Any]) -> None:
    settings |= {"tokens": 8000, "evaluation_tokens": 200, "statistics_tokens": 200, **extra}
    whole = TrainingConfig(**{**settings, "out": settings["out"].with_name("whole")})
    run_training(whole)
    config = TrainingConfig(**settings)
    for stop in (700, 5000):  # before and after the buffers were refilled several times
        with pytest.raises(KeyboardInterrupt):
            run_training(config, interrupt_at(stop))
        assert config.checkpoint_path.exists()
        assert not config.out.exists()
    run_training(config)
    assert_bit_equal(config.out, whole.out)


@pytest.mark.usefixtures("_every_step_reports")
def test_a_checkpoint_of_another_run_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_training(TrainingConfig(**settings), interrupt_at(1000))
    with pytest.raises(ValueError, match=r"belongs to another run: k was 8, is 4; restore the settings"):
        run_training(TrainingConfig(**{**settings, "k": 4}))
    TrainingConfig(**settings).checkpoint_path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        run_training(TrainingConfig(**settings))


@pytest.mark.usefixtures("_every_step_reports")
@pytest.mark.filterwarnings("ignore:the run goes on with backbone_dtype")
def test_the_dtypes_that_a_run_chose_are_recorded_and_kept(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(**settings | {"compute_dtype": "auto", "backbone_dtype": "auto"})
    monkeypatch.setattr(worker, "default_compute_dtype", lambda device: torch.bfloat16)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, interrupt_at(4_000))
    monkeypatch.setattr(worker, "default_compute_dtype", lambda device: torch.float32)
    with pytest.warns(
        UserWarning, match="goes on with compute_dtype bfloat16, as it began; this machine is faster in float32"
    ):
        (resumed,) = run_training(config)
    recorded = resumed.manifest.provenance.config
    assert (recorded["compute_dtype"], recorded["backbone_dtype"]) == ("bfloat16", "bfloat16")
    whole = {"compute_dtype": "bfloat16", "backbone_dtype": "bfloat16", "out": config.out.with_name("whole")}
    run_training(TrainingConfig(**settings | whole))
    assert_bit_equal(config.out, config.out.with_name("whole"))


def test_a_new_run_takes_the_dtype_that_is_fast_here(settings: dict[str, Any]) -> None:
    config = TrainingConfig(**settings | {"compute_dtype": "auto", "backbone_dtype": "auto", "tokens": 256})
    (result,) = run_training(config)
    fast = str(default_compute_dtype("cpu")).removeprefix("torch.")
    recorded = result.manifest.provenance.config
    assert (recorded["compute_dtype"], recorded["backbone_dtype"]) == (fast, fast)


def test_errors_come_before_the_work(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text file at .*missing\.txt"):
        run_training(TrainingConfig(**{**settings, "data": [tmp_path / "missing.txt"]}))
    with pytest.raises(ValueError, match="layers 0 to 1"):
        run_training(TrainingConfig(**{**settings, "site": "5.resid_pre"}))
    with pytest.raises(ValueError, match="context_length is 64, the backbone reads at most 32"):
        run_training(TrainingConfig(**{**settings, "context_length": 64}))
    settings["out"].mkdir()
    with pytest.raises(FileExistsError, match="exists; remove it"):
        run_training(TrainingConfig(**settings))


def test_held_out_files_are_used_as_they_are(settings: dict[str, Any], tmp_path: Path, tiny_backbone: Backbone) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("these words are only in the held-out file, " * 3)
    config = TrainingConfig(**{**settings, "held_out": [held_out]})
    rows = list(held_out_rows(config, tiny_backbone, 10**6))
    assert tiny_backbone.tokenizer is not None
    assert tiny_backbone.tokenizer.decode(rows[0]).startswith("these words are only")
    assert sum(map(len, rows)) >= 96
    held_out.write_text("")
    with pytest.raises(ValueError, match="no held-out text"):
        list(held_out_rows(config, tiny_backbone, 1000))


def test_a_run_that_stopped_at_a_bad_line_goes_on_from_its_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i} " + "small words that fire " * 45}) for i in range(280)]
    lines[270] = '{"text": "cut'
    text, held_out = tmp_path / "cut.jsonl", settings["data"][0]
    text.write_text("\n".join(lines))
    larger = {"tokens": 280_000, "batch_tokens": 4096, "buffer_tokens": 8192, "backbone_tokens": 4096}
    settings |= larger | {"data": [text], "held_out": [held_out], "checkpoint_interval": 1e-6}
    settings.pop("held_out_fraction")
    with pytest.raises(ValueError, match=r"cut\.jsonl:271: expected .*; the last checkpoint is .*tiny\.checkpoint\.pt"):
        run_training(TrainingConfig(**settings))
    resumed: list[Progress] = []
    with pytest.warns(UserWarning, match=r"skipped 1 document .*cut\.jsonl:271"):
        run_training(TrainingConfig(**settings, bad_documents="skip"), resumed.append)
    assert next(event for event in resumed if event.stage == "train").done > 200_000
    other = tmp_path / "other"
    with pytest.warns(UserWarning, match="skipped 1 document"):
        run_training(TrainingConfig(**settings | {"out": other}, bad_documents="skip"))
    assert_bit_equal(settings["out"], other)
