"""What this rank holds of the weights that a DeepSpeed ZeRO engine trains, and of their gradients.

Under every ZeRO stage a rank steps its own share of the master weights: a flat vector for each
parameter group, under stage 3 one or more of them (sub-groups). The names of DeepSpeed's attributes
stand here alone. They are those of deepspeed 0.19: `runtime/zero/stage3.py`,
`runtime/zero/stage_1_and_2.py`, and for ZeRO-1 in bf16 with gradients summed in fp32
`runtime/bf16_optimizer.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def masters(engine: Any) -> list[Tensor]:
    """The flat masters of this rank, without gradient, in the memory that the engine steps.

    In fp32, unless the JSON says `bf16_master_weights_and_grads`. Order and lengths are those in
    the rank's optimizer file of a checkpoint: `fp32_flat_groups` under ZeRO-3,
    `single_partition_of_fp32_groups` under ZeRO-1 and 2.
    """
    optimizer = engine.optimizer
    if _is_zero_3(optimizer):
        flats = optimizer.fp32_partitioned_groups_flat
    elif _is_bf16_optimizer(optimizer):
        flats = optimizer.fp32_groups_flat_partition
    else:  # saved without the padding of the last rank
        padded = zip(
            optimizer.single_partition_of_fp32_groups, optimizer.groups_padding, strict=True
        )
        flats = [flat[: flat.numel() - padding] for flat, padding in padded]
    return [flat.detach() for flat in flats]


@torch.no_grad()
def gradient_squares(engine: Any) -> dict[str, Tensor]:
    """Sums of squares of this rank's share of the gradients, by the key `part` of their group.

    The gradients are averaged over ranks and micro batches, and not clipped. Summed over the ranks
    the numbers are squared norms. They are 0-dim, fp32, on the engine's device, and made without
    waiting for it. Valid between `engine.backward` of a step's last micro batch and `engine.step`.
    """
    groups = engine.optimizer.param_groups
    squares = {g["part"]: torch.zeros((), device=engine.device) for g in groups}
    for index, norms in _gradient_norms(engine.optimizer):
        if norms:
            squares[groups[index]["part"]] += torch.stack(norms).square().sum()
    return squares


class _GroupNorms(NamedTuple):
    """Norms, 0-dim and fp32, of pieces that together are a rank's share of a parameter group."""

    index: int
    norms: list[Tensor]


def _gradient_norms(optimizer: Any) -> list[_GroupNorms]:
    if _is_bf16_optimizer(optimizer):
        gradients = dict(enumerate([g] for g in optimizer.fp32_groups_gradient_flat_partition))
        return [_GroupNorms(index, _norms(pieces)) for index, pieces in gradients.items()]
    if _is_zero_3(optimizer):
        offloaded, members = optimizer.offload_optimizer, optimizer.fp16_groups
        group_of = optimizer.sub_group_to_group_id
    else:
        offloaded, members = optimizer.cpu_offload, optimizer.params_in_partition
        group_of = {index: index for index in range(len(members))}
    if offloaded:  # DeepSpeed takes each norm on the device, before the gradient goes to the host
        known = optimizer.norm_for_param_grads
        ids = [[optimizer.get_param_id(p) for p in parameters] for parameters in members]
        norms = [[known[i].float() for i in own if i in known] for own in ids]
    else:
        norms = [_norms(optimizer.averaged_gradients[index]) for index in range(len(members))]
    return [_GroupNorms(group_of[index], own) for index, own in enumerate(norms)]


def _norms(gradients: list[Tensor] | None) -> list[Tensor]:
    assert gradients is not None, "there are gradients between backward and step alone"
    return list(torch._foreach_norm(gradients, 2, dtype=torch.float32))


def _is_zero_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _is_bf16_optimizer(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_groups_gradient_flat_partition")


def saved_bytes(engine: Any) -> int:
    """Bytes of the tensors that DeepSpeed writes of this rank into a checkpoint.

    Whole storages, as `torch.save` writes them: those of a view with what lies around it. The state
    that an optimizer makes at its first step is counted before it too.
    """
    tensors, base = masters(engine), engine.optimizer.optimizer
    moments = [v for state in base.state.values() for v in state.values() if isinstance(v, Tensor)]
    group = base.param_groups[0]
    to_come = 2 if "betas" in group else int(group.get("momentum", 0) > 0)  # Adam's, or SGD's
    num_bytes = 0 if moments else to_come * sum(master.nbytes for master in tensors)
    tensors += moments
    if _is_zero_3(engine.optimizer):
        tensors += [p.ds_tensor for p in engine.module.parameters() if not p.requires_grad]
        tensors += engine.module.buffers()
    elif dist.get_rank() == 0:  # the others write no module
        tensors += engine.module.state_dict().values()
    storages = [tensor.untyped_storage() for tensor in tensors]
    return num_bytes + sum({s.data_ptr(): s.nbytes() for s in storages}.values())
