"""What this rank holds of the weights that a DeepSpeed ZeRO engine trains, and of their gradients.

Under every ZeRO stage a rank steps its own share of the master weights: a flat vector for each
parameter group, under stage 3 one or more of them (sub-groups). Which elements of which parameter
lie in a vector is its layout. The names of DeepSpeed's attributes stand here alone. They are those
of deepspeed 0.19: `runtime/zero/stage3.py`, `runtime/zero/stage_1_and_2.py`, and for ZeRO-1 in bf16
with gradients summed in fp32 `runtime/bf16_optimizer.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae_ds.conversion.optimizer_states import Counters


class Part(NamedTuple):
    """`numel` elements of a tensor, flat, from its element `first` on: at `start` of a vector."""

    name: str
    first: int
    start: int
    numel: int


class Share(NamedTuple):
    """A flat vector in the memory that the engine uses; what is in no part is padding."""

    vector: Tensor
    parts: list[Part]


def masters(engine: Any) -> list[Tensor]:
    """The flat masters of this rank, without gradient, in the memory that the engine steps.

    In fp32, unless the JSON says `bf16_master_weights_and_grads`. Order and lengths are those in
    the rank's optimizer file of a checkpoint: `fp32_flat_groups` under ZeRO-3,
    `single_partition_of_fp32_groups` under ZeRO-1 and 2.
    """
    optimizer, flats = engine.optimizer, stepped(engine)
    if not _is_zero_3(optimizer) and not _is_bf16_optimizer(optimizer):
        padded = zip(flats, optimizer.groups_padding, strict=True)
        flats = [flat[: flat.numel() - padding] for flat, padding in padded]
    return [flat.detach() for flat in flats]


def stepped(engine: Any) -> list[Tensor]:
    """The vectors of `masters` as the base optimizer knows them: leaves, with all their padding."""
    optimizer = engine.optimizer
    if _is_zero_3(optimizer):
        return optimizer.fp32_partitioned_groups_flat
    if _is_bf16_optimizer(optimizer):
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def layout(engine: Any) -> list[list[Part]]:
    """Which elements of which parameters lie where in each vector of `masters`."""
    optimizer = engine.optimizer
    place = _place_in_zero_3 if _is_zero_3(optimizer) else _place_below_zero_3
    return [place(engine, members) for members in _members(optimizer)]


def groups(engine: Any) -> list[list[str]]:
    """Names of the trained parameters of each vector of `masters`, on whichever rank they lie."""
    names = engine.param_names
    return [[names[p] for p in members] for members in _members(engine.optimizer)]


def parameter_groups(engine: Any) -> list[dict[str, Any]]:
    """The optimizer's parameter group of each vector of `masters`."""
    optimizer, found = engine.optimizer, engine.optimizer.param_groups
    if not _is_zero_3(optimizer):
        return found
    return [found[optimizer.sub_group_to_group_id[i]] for i in range(len(optimizer.fp16_groups))]


def trained_names(engine: Any) -> set[str]:
    """Names of all parameters that the engine's optimizer owns."""
    return {name for names in groups(engine) for name in names}


def frozen_shares(engine: Any) -> list[Share]:
    """This rank's share of each partitioned parameter that is not trained; below ZeRO-3 none is."""
    trained, shares = trained_names(engine), []
    for name, parameter in engine.module.named_parameters():
        if name not in trained and hasattr(parameter, "ds_tensor"):
            parts = _place_in_zero_3(engine, [parameter])
            shares.append(Share(parameter.ds_tensor.detach(), parts))
    return shares


def whole_tensors(engine: Any) -> dict[str, Tensor]:
    """What a state dict holds of the tensors that are whole on every rank and not trained.

    These are the persistent buffers, and below ZeRO-3 the frozen parameters.
    """
    trained = trained_names(engine)
    return {
        name: tensor.detach()
        for name, tensor in engine.module.state_dict(keep_vars=True).items()
        if name not in trained and not hasattr(tensor, "ds_tensor")
    }


def shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the engine's state dict, partitioned or not."""
    tensors = engine.module.state_dict(keep_vars=True)
    return {name: tuple(getattr(t, "ds_shape", t.shape)) for name, t in tensors.items()}


def prepare_loading(engine: Any) -> None:
    """Leave no copy of a weight but the shares that are about to be set; all ranks call it.

    Under ZeRO-3 parameters may be whole at the time; hpZ keeps a second partition of each, that of
    a frozen one for good, and makes it anew from the first where there is none.
    """
    if _is_zero_3(engine.optimizer):
        engine.optimizer.checkpoint_event_prologue()
        for parameter in engine.module.parameters():
            parameter.ds_secondary_tensor = None


def optimizer_state(engine: Any) -> list[dict[str, Any]]:
    """What the base optimizer keeps for each vector of `stepped`; nothing before its first step."""
    states = engine.optimizer.optimizer.state
    return [states.get(vector, {}) for vector in stepped(engine)]


def set_optimizer_state(engine: Any, states: list[dict[str, Any]]) -> None:
    """Replace what the base optimizer keeps for each vector of `stepped`: by element in a tensor
    of its length and place, else a number or a 0-dim tensor on the host."""
    for vector, state in zip(stepped(engine), states, strict=True):
        engine.optimizer.optimizer.state[vector] = state


def publish_masters(engine: Any) -> None:
    """Give the weights of the forward pass the values of the masters; all ranks call it.

    DeepSpeed does the same at the end of a step.
    """
    optimizer = engine.optimizer
    if not _is_zero_3(optimizer):
        optimizer.update_lp_params()
        return
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()  # gathers the parameters that stay whole


def set_counters(engine: Any, counters: Counters) -> None:
    """Count on from `counters`, after the last micro batch of a step."""
    for field, value in counters._asdict().items():
        setattr(engine, field, value)
    engine.micro_steps = counters.global_steps * engine.gradient_accumulation_steps()


@torch.no_grad()
def gradient_squares(engine: Any) -> dict[str, Tensor]:
    """Sums of squares of this rank's share of the gradients, by the key `part` of their group.

    The gradients are averaged over ranks and micro batches, and not clipped. Summed over the ranks
    the numbers are squared norms: what is whole on every rank of a tensor-parallel group counts on
    its first. They are 0-dim, fp32, on the engine's device, and made without
    waiting for it. Valid between `engine.backward` of a step's last micro batch and `engine.step`.
    """
    is_first = engine.mpu is None or engine.mpu.get_model_parallel_rank() == 0
    groups, norms = parameter_groups(engine), _gradient_norms(engine.optimizer)
    squares = {g["part"]: torch.zeros((), device=engine.device) for g in groups}
    for group, own in zip(groups, norms, strict=True):
        if own and (is_first or group.get("split")):
            squares[group["part"]] += torch.stack(own).square().sum()
    return squares


def _gradient_norms(optimizer: Any) -> list[list[Tensor]]:
    """For each vector of `masters` the norms, 0-dim and fp32, of pieces that together make it."""
    if _is_bf16_optimizer(optimizer):
        return [_norms([flat]) for flat in optimizer.fp32_groups_gradient_flat_partition]
    if _is_zero_3(optimizer):
        offloaded, members = optimizer.offload_optimizer, optimizer.fp16_groups
    else:
        offloaded, members = optimizer.cpu_offload, optimizer.params_in_partition
    if offloaded:  # DeepSpeed takes each norm on the device, before the gradient goes to the host
        known = optimizer.norm_for_param_grads
        ids = [[optimizer.get_param_id(p) for p in parameters] for parameters in members]
        return [[known[i].float() for i in own if i in known] for own in ids]
    return [_norms(optimizer.averaged_gradients[index]) for index in range(len(members))]


def _norms(gradients: list[Tensor] | None) -> list[Tensor]:
    assert gradients is not None, "there are gradients between backward and step alone"
    return list(torch._foreach_norm(gradients, 2, dtype=torch.float32))


def _members(optimizer: Any) -> list[list[Tensor]]:
    """The parameters of each flat vector, in its order."""
    if _is_zero_3(optimizer):
        return optimizer.fp16_groups
    if _is_bf16_optimizer(optimizer):
        return optimizer.bf16_groups
    return optimizer.bit16_groups


def _place_in_zero_3(engine: Any, members: list[Tensor]) -> list[Part]:
    """A rank has an equal share of every parameter, the last ranks a padded or an empty one."""
    start, parts = 0, []
    for parameter in members:
        size = parameter.ds_tensor.ds_numel
        first = parameter.ds_zero_partition_rank * size
        numel = min(max(parameter.ds_numel - first, 0), size)
        if numel:
            parts.append(Part(engine.param_names[parameter], first, start, numel))
        start += size
    return parts


def _place_below_zero_3(engine: Any, members: list[Tensor]) -> list[Part]:
    """The parameters of a group lie end to end, and the whole is cut into equal vectors."""
    parts = []
    for parameter in members:
        if parameter._hp_mapping is not None:
            inside = parameter._hp_mapping.lp_fragment_address
            start = parameter._hp_mapping.hp_fragment_address.start
            name = engine.param_names[parameter]
            parts.append(Part(name, inside.start, start, inside.numel))
    return parts


def _is_zero_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _is_bf16_optimizer(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_groups_gradient_flat_partition")


def saved_bytes(engine: Any) -> int:
    """Bytes of the tensors that DeepSpeed writes of this rank, without those that are frozen.

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
        tensors += engine.module.buffers()
    elif dist.get_rank(engine.optimizer.dp_process_group) == 0:  # the others write no module
        frozen = {n for n, p in engine.module.named_parameters() if not p.requires_grad}
        state = engine.module.state_dict()
        tensors += [tensor for name, tensor in state.items() if name not in frozen]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return num_bytes + sum({s.data_ptr(): s.nbytes() for s in storages}.values())
