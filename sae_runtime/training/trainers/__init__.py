"""Trainers, one for each family of dictionaries (../README.md)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_runtime.training.communicator import SINGLE, Communicator
from sae_runtime.training.config import Family, TrainingConfig
from sae_runtime.training.trainers.batch_topk import BatchTopKTrainer
from sae_runtime.training.trainers.gated import GatedTrainer
from sae_runtime.training.trainers.jumprelu import JumpReluTrainer
from sae_runtime.training.trainers.matryoshka import MatryoshkaTrainer
from sae_runtime.training.trainers.relu import ReluDecoderNormTrainer, ReluTrainer
from sae_runtime.training.trainers.topk import TopKTrainer
from sae_runtime.training.trainers.trainer import StepMetrics, Trainer

TRAINERS: dict[Family, type[Trainer]] = {
    "topk": TopKTrainer,
    "batch_topk": BatchTopKTrainer,
    "matryoshka": MatryoshkaTrainer,
    "relu": ReluTrainer,
    "relu_decoder_norm": ReluDecoderNormTrainer,
    "jumprelu": JumpReluTrainer,
    "gated": GatedTrainer,
}

__all__ = ["TRAINERS", "StepMetrics", "Trainer", "new_trainer", "restored_trainer"]


def new_trainer(config: TrainingConfig, d_in: int, sample: Tensor, communicator: Communicator = SINGLE) -> Trainer:
    """A trainer of the configured family; `sample` [m, d_in] are raw activations.

    Raises:
        ValueError: all sampled activations are equal, or the size does not fit.
    """
    return TRAINERS[config.family](config, d_in, sample, communicator)


def restored_trainer(config: TrainingConfig, state: dict[str, Any], communicator: Communicator = SINGLE) -> Trainer:
    """The trainer whose `state_dict` was saved."""
    return TRAINERS[config.family].from_state(config, state, communicator)
