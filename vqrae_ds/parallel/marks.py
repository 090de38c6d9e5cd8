"""What a parameter says of itself where a tensor-parallel group divides it."""

from __future__ import annotations

from torch import Tensor, nn


def mark_split(parameter: nn.Parameter, whole_shape: tuple[int, ...]) -> None:
    """Mark this rank's slice of a parameter of `whole_shape`.

    In the norm of the gradient DeepSpeed then counts the slice of every rank, and all other
    parameters once a group (deepspeed 0.19.8, runtime/utils.py, `is_model_parallel_parameter`).
    """
    parameter.model_parallel = parameter.tensor_model_parallel = True
    parameter.whole_shape = tuple(whole_shape)


def is_split(parameter: nn.Parameter) -> bool:
    """Whether each rank of a tensor-parallel group holds another slice of it."""
    return getattr(parameter, "tensor_model_parallel", False)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor, whatever a tensor-parallel group and ZeRO-3 do with it."""
    own = getattr(tensor, "ds_shape", tensor.shape)
    return getattr(tensor, "whole_shape", tuple(own))
