"""The configuration of a run: model YAML + DeepSpeed JSON + overrides -> one frozen, checked description.

Importing this package imports neither torch nor deepspeed: a mistake is reported within a second.
"""

from vqrae_ds.config.reading import Run, Schedule, describe, parse_command_line, read_run
from vqrae_ds.config.schema import (
    AdversarialConfig,
    DecoderConfig,
    DistillationConfig,
    LearningRateMultiplierConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    resolve_model,
)

__all__ = [
    "AdversarialConfig",
    "DecoderConfig",
    "DistillationConfig",
    "LearningRateMultiplierConfig",
    "LossConfig",
    "ModelConfig",
    "Run",
    "Schedule",
    "TrainConfig",
    "describe",
    "parse_command_line",
    "read_run",
    "resolve_model",
]
