"""What the optimizer and the engine remember beside the weights, out of DeepSpeed's files.

AdamW keeps two numbers for each weight, its moments, and counts its steps; SGD keeps none, or with
momentum one. PyTorch's optimizer keeps them by flat vector, so on file the numbers of each weight
lie as the masters do: they are read by the same names and ranges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vqrae_ds.conversion.rank_files import entry, load
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint


class OptimizerStates(NamedTuple):
    """`vectors` maps a key such as "exp_avg" to a reader of its values, by name of the parameter.

    `scalars` maps the name of a trained parameter to what is kept once for all of its vector, such
    as the 0-dim "step"; a vector may have none.
    """

    vectors: dict[str, ZeroCheckpoint]
    scalars: dict[str, dict[str, Any]]


class Counters(NamedTuple):
    """How far an engine is: optimizer steps, among them the skipped ones, and samples."""

    global_steps: int
    skipped_steps: int
    global_samples: int


class _State(NamedTuple):
    """What is kept beside one flat vector of one rank."""

    vectors: dict[str, Tensor]
    scalars: dict[str, Any]


def read_optimizer_states(checkpoint: ZeroCheckpoint) -> OptimizerStates:
    """All that the base optimizer of one engine kept, mapped and not loaded.

    Raises `ValueError`, naming the file, where a rank's state is not that of an optimizer over its
    masters, or contradicts that of another rank.
    """
    files, masters = checkpoint.files.optimizers, checkpoint.masters
    states = [
        _read_rank(file, checkpoint.files.partitioned, [flat.numel() for flat in rank.flats])
        for file, rank in zip(files, masters, strict=True)
    ]
    keys = [list(state.vectors) for state in states[0]]
    for file, rank in zip(files, states, strict=True):
        if [list(s.vectors) for s in rank] != keys or any(k != keys[0] for k in keys):
            raise ValueError(f"{file} holds other optimizer states than {files[0].name}")
        if [s.scalars for s in rank] != [s.scalars for s in states[0]]:
            raise ValueError(f"{file} is of another step of the optimizer than {files[0].name}")
    vectors = {}
    for key in keys[0] if keys else ():
        flats = [[state.vectors[key] for state in rank] for rank in states]
        placed = [m._replace(flats=f) for m, f in zip(masters, flats, strict=True)]
        vectors[key] = checkpoint.beside(placed)
    scalars = {
        name: state.scalars
        for state, names in zip(states[0], checkpoint.groups(), strict=True)
        for name in names
    }
    return OptimizerStates(vectors, scalars)


def read_counters(checkpoint: ZeroCheckpoint) -> Counters:
    """What the engine counted. Raises `ValueError`, naming the file, where it does not say."""
    file = checkpoint.files.models[0]
    state = load(file)
    return Counters(*(entry(state, field, int, file) for field in Counters._fields))


def _read_rank(file: Path, partitioned: bool, sizes: list[int]) -> list[_State]:
    """A state for each flat vector of a rank; `sizes` are the lengths of these, without padding."""
    own = entry(load(file), "optimizer_state_dict", dict, file)
    base = entry(own, "optimizer_state_dict" if partitioned else "base_optimizer_state", dict, file)
    groups = entry(base, "param_groups", list, file)
    numbers = [number for group in groups for number in entry(group, "params", list, file)]
    if len(numbers) != len(sizes):
        raise ValueError(f"{file}: the optimizer has {len(numbers)} vectors, not {len(sizes)}")
    known = entry(base, "state", dict, file)
    states = []
    for number, size in zip(numbers, sizes, strict=True):
        kept = known.get(number, {})
        vectors = {k: v for k, v in kept.items() if isinstance(v, Tensor) and v.ndim > 0}
        for key, vector in vectors.items():
            # Below ZeRO-3 the last rank's masters are saved without their padding, these with it.
            if vector.ndim > 1 or vector.numel() < size:
                raise ValueError(
                    f"{file}: {key} is {tuple(vector.shape)} beside {size} weights: the file is "
                    "damaged or of another optimizer"
                )
        states.append(_State(vectors, {k: v for k, v in kept.items() if k not in vectors}))
    return states
