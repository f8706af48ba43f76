"""What of a run's settings is recorded, and what may change when it goes on."""

from pathlib import Path

import pytest

from sae_runtime import Backbone
from sae_runtime.training.config import TrainingConfig
from sae_runtime.training.identity import check_identity, recorded_settings, run_identity


def test_a_record_holds_no_paths() -> None:
    config = TrainingConfig(
        site="0.resid_pre", data=(Path("/somewhere/a.txt"),), out=Path("/somewhere/out"), log=Path("/somewhere/log")
    )
    assert "somewhere" not in str(recorded_settings(config))
    assert recorded_settings(config)["data"] == ["a.txt"]


def test_a_run_goes_on_with_what_does_not_change_its_weights(tiny_backbone: Backbone) -> None:
    def identity(**settings: object) -> dict[str, object]:
        base = {"site": "0.resid_pre", "data": ["a.txt"], "out": "d", "k": 8}
        return run_identity(TrainingConfig.model_validate(base | settings), tiny_backbone)

    path = Path("checkpoint.pt")
    check_identity(identity(out="elsewhere", threads=2, micro_batch_tokens=64), identity(), path)
    with pytest.raises(ValueError, match=r"checkpoint.pt belongs to another run: k was 8, is 9, seed was 0, is 1;"):
        check_identity(identity(), identity(k=9, seed=1), path)
    with pytest.raises(ValueError, match=r"its backbone has fingerprint other, this one \w+"):
        check_identity(identity() | {"backbone": "other"}, identity(), path)
