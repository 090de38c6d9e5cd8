"""A frozen encoder that is whole on every rank, and so outside the engine's module tree.

What is in the tree under ZeRO-3 is partitioned, and released after every step. Outside it there is
nothing to gather; there is no gradient to reduce either. The module stays an attribute of its
owner, so the model's code is the same. DeepSpeed knows nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.sharding import first_weights

logger = logging.getLogger(__name__)

Gather = Callable[[list[nn.Parameter]], AbstractContextManager]


@torch.no_grad()
def take_out(
    model: TrainingModel, gather: Gather, device: torch.device, dtype: torch.dtype
) -> None:
    """Make the frozen encoder, or the teacher, whole on this rank and take it out of the tree.

    Inside `gather(parameters)` these are whole: all ranks call this together. The encoder has its
    values by then, on rank 0 at least; from here on it is in evaluation mode.
    """
    if model.teacher is not None:
        owner, name = model, "teacher"
    elif model.vqrae.freeze_encoder:
        owner, name = model.vqrae, "encoder"
    else:
        logger.warning("memory.frozen_encoder = resident has no effect: no encoder is frozen here")
        return
    encoder = getattr(owner, name)
    for module in encoder.modules():
        own = dict(module.named_parameters(recurse=False))
        with gather(list(own.values())):
            whole = {key: p.data.to(device, dtype, copy=True) for key, p in own.items()}
        for key, value in whole.items():
            dist.broadcast(value, 0)  # below ZeRO-3 they are filled on rank 0 alone
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    encoder.to(device).eval()  # the buffers, in their own dtypes
    delattr(owner, name)
    vars(owner)[name] = encoder  # what is assigned to a module would be in its tree again


def resident_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What is outside the tree, by the prefix that its names would have in it.

    Nothing is outside that of a discriminator.
    """
    places = {
        "vqrae.encoder.": vars(getattr(model, "vqrae", model)).get("encoder"),
        "teacher.": vars(model).get("teacher"),
    }
    return {prefix: module for prefix, module in places.items() if isinstance(module, nn.Module)}


def state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors outside the tree, not copied, by their names in it; none where all is sharded."""
    return {
        prefix + name: tensor
        for prefix, module in resident_modules(model).items()
        for name, tensor in module.state_dict().items()
    }


def check_filled(model: nn.Module) -> None:
    """`first_weights.check_filled` of all that is in the tree, and of what is outside of it."""
    for module in (model, *resident_modules(model).values()):
        first_weights.check_filled(module)
