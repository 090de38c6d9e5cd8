"""What the generator engine trains: the tokenizer and, in stage 2, the frozen first encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqrae_ds.models.vqrae import VQRAE, VQRAEOutput


class TrainingOutput(NamedTuple):
    """`teacher_features_BND` are the first encoder's of the same images, without gradient."""

    vqrae: VQRAEOutput
    teacher_features_BND: Tensor | None


class TrainingModel(nn.Module):
    """One module for one engine, so that the teacher is sharded like everything else.

    With `teacher_in_training=False` the teacher runs in eval mode alone, for validation: a forward
    of training is spared the cost of a second encoder.
    """

    def __init__(
        self, vqrae: VQRAE, teacher: nn.Module | None = None, *, teacher_in_training: bool = True
    ) -> None:
        super().__init__()
        self.vqrae = vqrae
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.teacher_in_training = teacher_in_training

    def forward(self, images_B3HW: Tensor) -> TrainingOutput:
        """Images (B, 3, H, W) in [0, 1]."""
        features_BND = None
        if self.teacher is not None and (self.teacher_in_training or not self.training):
            with torch.no_grad():
                features_BND = self.teacher(self.vqrae.resize_for_encoder(images_B3HW))
        return TrainingOutput(self.vqrae(images_B3HW), features_BND)
