"""Load one engine's checkpoint into an engine over the same or another number of ranks.

Every rank maps the files of all ranks that wrote them, and reads its own share of each tensor and
of what the optimizer keeps beside it: no process gathers a tensor that it does not use whole. What
every rank holds whole, rank 0 reads and sends. There is no other way for the same number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae_ds import watchdog
from vqrae_ds.conversion.optimizer_states import (
    Counters,
    OptimizerStates,
    read_counters,
    read_optimizer_states,
)
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.models.quantizer import Quantizer
from vqrae_ds.parallel.slices import ALONE
from vqrae_ds.sharding import partitions, resident
from vqrae_ds.sharding.partitions import Part

NUM_NAMED = 3  # of the tensors that do not fit: a message stays one line


class Stored(NamedTuple):
    """The checkpoint of one engine, mapped, read as far as it takes to know that it fits."""

    weights: ZeroCheckpoint
    states: OptimizerStates
    counters: Counters


def open_stored(folder: Path, engine: Any) -> Stored:
    """Map the files in an engine's folder of a checkpoint; the engine is not changed.

    Raises `ValueError` where a file is missing, damaged, or holds anything but data, and where the
    tensors are not those of the engine, naming them.
    """
    weights = ZeroCheckpoint(folder)
    place = ALONE if engine.mpu is None else engine.mpu.place
    if weights.tensor_size != place.size:
        raise ValueError(
            f"{folder} was written with tensor_parallel.autotp_size = {weights.tensor_size}, and "
            f"the run has {place.size}: set it back, or start a new run from it with init.from_run"
        )
    weights = weights.sliced(place)
    _check_same_tensors(weights, engine)
    states = read_optimizer_states(weights)
    for names in partitions.groups(engine):
        _scalars_of(names, states)
    return Stored(weights, states, read_counters(weights))


@torch.no_grad()
def load(engine: Any, stored: Stored) -> None:
    """Set weights, optimizer state and counters of an engine; all ranks call it together.

    The learning rates are left to the caller. Raises `AssertionError`, on all ranks together, for
    a weight that is not finite afterwards.
    """
    partitions.prepare_loading(engine)
    layout = partitions.layout(engine)
    for master, parts in zip(partitions.masters(engine), layout, strict=True):
        fill(master, parts, stored.weights)
    for share in partitions.frozen_shares(engine):
        fill(share.vector, share.parts, stored.weights)
    data_group = None if engine.mpu is None else engine.mpu.data_group
    for name, tensor in _whole_tensors(engine).items():
        if dist.get_rank(data_group) == 0:
            tensor.copy_(stored.weights.read(name))
        dist.broadcast(tensor, group=data_group, group_src=0)
    partitions.set_optimizer_state(engine, _optimizer_state(engine, stored.states))
    partitions.publish_masters(engine)
    partitions.set_counters(engine, stored.counters)
    for module in engine.module.modules():
        if isinstance(module, Quantizer):
            module.forget_codes()
    resident.check_filled(engine.module)


@torch.no_grad()
def fill(vector: Tensor, parts: list[Part], source: ZeroCheckpoint) -> None:
    """Set the parts of a flat vector from the checkpoint, piece by piece, and its padding to 0."""
    vector.zero_()
    for part in parts:
        start = part.start
        for piece in source.range_pieces(part.name, part.first, part.numel):
            vector[start : start + piece.numel()].copy_(piece)
            start += piece.numel()
            watchdog.progress()
        assert start == part.start + part.numel, f"the checkpoint is short of {part.name}"


def _optimizer_state(engine: Any, states: OptimizerStates) -> list[dict[str, Any]]:
    """What the base optimizer is to keep for each of its vectors on this rank."""
    built = []
    layout, names = partitions.layout(engine), partitions.groups(engine)
    for vector, parts, members in zip(partitions.stepped(engine), layout, names, strict=True):
        state = {}
        for key, reader in states.vectors.items():
            dtype = reader.tensors[members[0]].dtype
            state[key] = torch.empty(vector.numel(), dtype=dtype, device=vector.device)
            fill(state[key], parts, reader)
        built.append(state | _scalars_of(members, states))
    return built


def _scalars_of(names: list[str], states: OptimizerStates) -> dict[str, Any]:
    """What is kept once for a vector: the same for all parameters in it, else `ValueError`."""
    first = states.scalars[names[0]]
    for name in names:
        if states.scalars[name] != first:
            raise ValueError(
                f"the optimizer counted {first} for {names[0]} and {states.scalars[name]} for "
                f"{name}, which now share a vector: resume with the number of ranks that wrote it"
            )
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in first.items()}


def _whole_tensors(engine: Any) -> dict[str, Tensor]:
    return partitions.whole_tensors(engine) | resident.state(engine.module)


def _check_same_tensors(weights: ZeroCheckpoint, engine: Any) -> None:
    own = partitions.shapes(engine)
    own |= {name: tuple(t.shape) for name, t in resident.state(engine.module).items()}
    trained = partitions.trained_names(engine)
    stored = {name for name, info in weights.tensors.items() if info.kind == "trainable"}
    stored -= weights.aliases.keys()
    misfits = {name: "missing" for name in own if name not in weights.tensors}
    misfits |= {
        name: f"{weights.shape(name)} and not {shape}"
        for name, shape in own.items()
        if name not in misfits and weights.shape(name) != shape
    }
    misfits |= {name: "trained, which the run does not have" for name in stored - own.keys()}
    misfits |= {name: "not trained" for name in (trained - stored) - misfits.keys()}
    misfits |= {name: "trained" for name in ((stored & own.keys()) - trained) - misfits.keys()}
    if misfits:
        named = [f"{name} is {what}" for name, what in list(misfits.items())[:NUM_NAMED]]
        more = f" and {len(misfits) - NUM_NAMED} more" if len(misfits) > NUM_NAMED else ""
        raise ValueError(
            f"{weights.folder} does not fit this run: {', '.join(named)}{more}: go on with the "
            "configuration that wrote it, or start a new run from it with init.from_run"
        )
