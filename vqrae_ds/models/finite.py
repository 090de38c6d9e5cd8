"""Refuses what a network gives where it is no number: images made of it look sound."""

from __future__ import annotations

from torch import Tensor


def check_finite(values: Tensor, name: str) -> None:
    """Raise `ValueError`, for what comes of such values looks sound: black and white pixels.

    Reads back from the device.
    """
    if count := int((~values.isfinite()).sum()):
        raise ValueError(
            f"{count} of {values.numel()} values of {name} are not finite: usually the weights are "
            "damaged or their training diverged"
        )
