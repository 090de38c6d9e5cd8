"""First values of the discriminator's weights: one that was trained before goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file
from torch import Tensor, nn

from vqrae_ds.config.schema import InitConfig
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.sharding.first_weights import Source, check_finite, start_folder

logger = logging.getLogger(__name__)

_AVERAGES = "averages."  # LeCam's
_Value = TypeVar("_Value")


def load_discriminator(discriminator: nn.Module, init: InitConfig) -> None:
    """A discriminator that was trained before goes on; where there is none it starts anew.

    That of another run (`init.from_run`) starts anew as well where its architecture is another.
    Raises `ValueError` for a file of `init.model` that does not fit, and for NaN or infinity.
    """
    if init.from_run is not None:
        _load_discriminator_of_run(discriminator, start_folder(init.from_run) / "discriminator")
    elif init.model is not None:
        _load_discriminator_file(discriminator, Path(init.model) / "discriminator.safetensors")


def _load_discriminator_of_run(discriminator: nn.Module, folder: Path) -> None:
    if not folder.is_dir():
        logger.info("%s does not exist: the discriminator starts untrained", folder)
        return
    checkpoint = ZeroCheckpoint(folder)
    own = {name: tuple(tensor.shape) for name, tensor in discriminator.state_dict().items()}
    found = {name: checkpoint.shape(name) for name in checkpoint.names()}
    if _without_averages(found) != _without_averages(own):
        logger.warning("%s is of another architecture: the discriminator starts untrained", folder)
        return
    _fill_discriminator(discriminator, {n: Source(checkpoint, n).read() for n in found})


def _load_discriminator_file(discriminator: nn.Module, path: Path) -> None:
    if not path.is_file():
        logger.info("%s does not exist: the discriminator starts untrained", path)
        return
    weights = load_file(path)
    for name, tensor in weights.items():
        check_finite(tensor, name, path)
    try:
        _fill_discriminator(discriminator, weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit losses.adversarial (discriminator, channels, num_layers): {error}"
        ) from error


def _fill_discriminator(discriminator: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set all weights; LeCam's averages are taken over where it is on now and was on before."""
    own = discriminator.state_dict()
    averages = {n: weights.get(n, tensor) for n, tensor in own.items() if n.startswith(_AVERAGES)}
    discriminator.load_state_dict(_without_averages(weights) | averages)


def _without_averages(by_name: Mapping[str, _Value]) -> dict[str, _Value]:
    return {name: value for name, value in by_name.items() if not name.startswith(_AVERAGES)}
