"""The files that the ranks of one DeepSpeed engine leave in a checkpoint: found, mapped, checked.

They are pickles: tensors and plain containers are all that is ever built from them. DeepSpeed
itself is not imported. Frozen weights may lie beside them, in safetensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from vqrae_ds.manifest import MANIFEST_NAME, frozen_file, missing_frozen, read_manifest, run_of

GENERATOR, DISCRIMINATOR = "generator", "discriminator"  # in a checkpoint's folder, one an engine
MODEL_CONFIG = "model_config.json"  # beside them
AVERAGE_FILES = "ema_rank_*.pt"  # in the checkpoint's folder, one a rank
AVERAGES = "averages"  # the key in such a file
FROZEN_FILE = "frozen.safetensors"  # in the folder of an engine, beside its ranks' files


class Address(NamedTuple):
    """Where one rank's flat vector holds its part of a parameter."""

    start: int
    numel: int


class Masters(NamedTuple):
    """One rank's flat vectors, one a group; `addresses` is empty under ZeRO-3."""

    flats: list[torch.Tensor]
    addresses: list[dict[str, Address]]


class Files(NamedTuple):
    """An engine's files in the order of the ranks; `partitioned` is ZeRO-3.

    Neighbours are the `tensor_size` ranks of a tensor-parallel group.
    """

    partitioned: bool
    models: list[Path]
    optimizers: list[Path]
    tensor_size: int = 1

    def of_tensor_rank(self, rank: int) -> Files:
        """The files of its data group alone."""
        own = slice(rank, None, self.tensor_size)
        return Files(self.partitioned, self.models[own], self.optimizers[own])


def average_file(checkpoint: Path, rank: int) -> Path:
    """The file in a checkpoint's folder that holds the moving averages of one rank."""
    return checkpoint / AVERAGE_FILES.replace("*", f"{rank:05d}")


def find_files(folder: Path) -> Files:
    """The engine's files; a rank too many (another run's?) is refused like a missing one."""
    optimizers = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    if not optimizers:
        raise ValueError(f"{folder} holds no zero_pp_rank_*_optim_states.pt: not a ZeRO checkpoint")
    state = entry(load(optimizers[0]), "optimizer_state_dict", dict, optimizers[0])
    world_size = _world_size(state, optimizers[0])
    partitioned = "fp32_flat_groups" in state
    prefix = optimizers[0].name.partition("zero_pp_rank_")[0]
    first = folder / f"{'zero_pp_rank_0_' if partitioned else ''}mp_rank_00_model_states.pt"
    tensor_size = _tensor_size(first)
    slices = [f"mp_rank_{rank:02d}" for rank in range(tensor_size)]
    ranks = [f"zero_pp_rank_{rank}_{name}" for rank in range(world_size) for name in slices]
    files = Files(
        partitioned,
        [folder / f"{name}_model_states.pt" for name in (ranks if partitioned else slices)],
        [folder / f"{prefix}{name}_optim_states.pt" for name in ranks],
        tensor_size,
    )
    _check_complete(folder, [*files.models, *files.optimizers], "*_states.pt", len(ranks))
    return files


def find_frozen_files(folder: Path) -> list[Path]:
    """The safetensors with the engine's frozen weights; none where DeepSpeed wrote them itself.

    What is not in the folder lies once in the run, and is the generator's. Raises `ValueError`
    where that file is missing.
    """
    found = [folder / FROZEN_FILE] if (folder / FROZEN_FILE).is_file() else []
    folder = folder.resolve()
    if folder.name == "generator" and (folder.parent / MANIFEST_NAME).is_file():
        record = read_manifest(folder.parent).frozen
        if record is not None:
            found.append(frozen_file(run_of(folder.parent), record))
            if not found[-1].is_file():
                raise ValueError(missing_frozen(found[-1]))
    return found


def read_masters(files: Files) -> list[Masters]:
    """The masters of each rank, fp32 or bf16, mapped. Raises `ValueError`, naming the file."""
    first, data_size = files.optimizers[0], len(files.optimizers) // files.tensor_size
    for file in files.optimizers:
        state = entry(load(file), "optimizer_state_dict", dict, file)
        if _world_size(state, file) != data_size:
            raise ValueError(f"{file} is of another world size than {first.name}")
    return [_read_masters(file, files.partitioned) for file in files.optimizers]


def read_averages(checkpoint: Path, masters: list[Masters]) -> list[Masters]:
    """The moving averages that each rank keeps of its `masters`, in their place.

    `checkpoint` is the step folder. Raises `ValueError` where it has none, and, naming the file,
    where that of a rank is missing or damaged, or does not fit the masters.
    """
    if not any(checkpoint.glob(AVERAGE_FILES)):
        raise ValueError(
            f"{checkpoint} holds no moving average ({AVERAGE_FILES}), for ema was off in its run: "
            "take the weights themselves"
        )
    files = [average_file(checkpoint, rank) for rank in range(len(masters))]
    _check_complete(checkpoint, files, AVERAGE_FILES, len(masters))
    averaged = []
    for rank, file in zip(masters, files, strict=True):
        flats = entry(load(file), AVERAGES, list, file)
        if [_shape(flat) for flat in flats] != [flat.shape for flat in rank.flats]:
            raise ValueError(f"{file} does not fit the optimizer's file of the same rank")
        averaged.append(rank._replace(flats=flats))
    return averaged


def _shape(average: Any) -> torch.Size | None:
    is_average = isinstance(average, torch.Tensor) and average.dtype == torch.float32
    return average.shape if is_average else None


def _check_complete(folder: Path, expected: list[Path], pattern: str, world_size: int) -> None:
    wanted, present = set(expected), set(folder.glob(pattern))
    if missing := sorted(str(path) for path in wanted - present):
        raise ValueError(f"{', '.join(missing)} missing: the checkpoint is of {world_size} ranks")
    if strange := sorted(str(path) for path in present - wanted):
        raise ValueError(
            f"{', '.join(strange)} does not belong to a checkpoint of {world_size} ranks"
        )


def _read_masters(file: Path, partitioned: bool) -> Masters:
    state = entry(load(file), "optimizer_state_dict", dict, file)
    key = "fp32_flat_groups" if partitioned else "single_partition_of_fp32_groups"
    flats = entry(state, key, list, file)
    if not all(isinstance(flat, torch.Tensor) and flat.ndim == 1 for flat in flats):
        raise ValueError(f"{file} has more than flat vectors in {key!r}")
    if partitioned:
        return Masters(flats, [])
    mappings = entry(state, "param_slice_mappings", list, file)
    addresses = [{n: Address(a.start, a.numel) for n, a in group.items()} for group in mappings]
    for flat, group in zip(flats, addresses, strict=True):
        for name, address in group.items():
            if not 0 <= address.start <= address.start + address.numel <= flat.numel():
                raise ValueError(f"{file} is too short for its part of {name}")
    return Masters(flats, addresses)


def _tensor_size(file: Path) -> int:
    """How many tensor ranks wrote, as the first rank's model file says; 1 where it is not there,
    which is told later on."""
    state = load(file) if file.is_file() else {}
    return entry(state, "mp_world_size", int, file) if "mp_world_size" in state else 1


def _world_size(state: dict[str, Any], file: Path) -> int:
    """The number of ranks that share the optimizer state; ZeRO-1 and 2 say it once per group."""
    count = entry(state, "partition_count", (int, list), file)
    counts = set(count) if isinstance(count, list) else {count}
    if len(counts) != 1:
        raise ValueError(f"{file} has groups over different numbers of ranks: {sorted(counts)}")
    return counts.pop()


def entry(state: Any, key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    """`state[key]`. Raises `ValueError` where there is none of that kind."""
    is_there = isinstance(state, dict) and key in state  # None may be a kind that is wanted
    if not is_there or not isinstance(state[key], kind):
        raise ValueError(f"{file} has no usable {key!r}: it is not a file of a ZeRO checkpoint")
    return state[key]


class _Record:
    """Stands in for DeepSpeed's own classes: takes their attributes, runs none of their code."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _stage_by_name(kind: type, name: str) -> int:
    """Stands in for `getattr`, by which some Pythons (3.11.2, Debian's) pickle an enumeration."""
    if kind is not int or name not in _STAGES:
        raise UnpicklingError(f"GLOBAL getattr of {name!r}")
    return _STAGES[name]


_ALLOWED = [
    (_stage_by_name, "builtins.getattr"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Record, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def load_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file by name, mapped. Raises `ValueError` where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def load(file: Path) -> Any:
    """Map one file; nothing in it is executed. Raises `ValueError` where it cannot be read."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what a damaged or hostile file raises has no common base
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{file} wants to load {refused[1]}, which is not data: refused"
            ) from None
        # Of some damages PyTorch's reader says nothing but that there is one.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} cannot be read: {reason}") from error
