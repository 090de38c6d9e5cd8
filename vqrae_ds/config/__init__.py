"""The configuration of a run: model YAML + DeepSpeed JSON + overrides -> one frozen description.

Importing this package imports neither torch nor deepspeed: a mistake is reported within a second.
"""

from vqrae_ds.config.checking import check_image_size, nearest_multiples
from vqrae_ds.config.command_line import parse_command_line
from vqrae_ds.config.encoder import choose_encoder
from vqrae_ds.config.losses import AdversarialConfig, DistillationConfig, LossConfig
from vqrae_ds.config.model import DecoderConfig, ModelConfig, resolve_model
from vqrae_ds.config.reading import Run, Schedule, check_same_model, describe, read_run
from vqrae_ds.config.schema import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    InitConfig,
    LearningRateMultiplierConfig,
    TrainConfig,
)

__all__ = [
    "AdversarialConfig",
    "CheckpointConfig",
    "DataConfig",
    "DecoderConfig",
    "DistillationConfig",
    "GuardConfig",
    "InitConfig",
    "LearningRateMultiplierConfig",
    "LossConfig",
    "ModelConfig",
    "Run",
    "Schedule",
    "TrainConfig",
    "check_image_size",
    "check_same_model",
    "choose_encoder",
    "describe",
    "nearest_multiples",
    "parse_command_line",
    "read_run",
    "resolve_model",
]
