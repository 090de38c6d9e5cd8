"""First values of the generator's weights: which file each is from; the proof that all were set.

Poison, then prove: everything is NaN before it is filled, so what stays without a value is found
and named, on whichever rank it lies. `engines` does the filling, under these context managers.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqrae_ds.config import TrainConfig
from vqrae_ds.conversion.record import Record, find_record
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.manifest import MANIFEST_NAME, read_manifest
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.models.weights import (
    StoredWeights,
    WeightFolder,
    check_names,
    check_shape,
    is_finite,
)
from vqrae_ds.parallel.marks import whole_shape
from vqrae_ds.parallel.slices import ALONE, Place, Split, own_slice, split_of
from vqrae_ds.ranks import gather

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where the first value of a tensor comes from."""

    folder: StoredWeights
    name: str
    split: Split | None = None  # where this rank takes a slice, that of its `place`
    place: Place = ALONE

    def read(self) -> Tensor:
        """The tensor, on the CPU. Raises `ValueError` where it holds NaN or infinity."""
        tensor = self.folder.read(self.name)
        check_finite(tensor, self.name, self.folder.file_of(self.name))
        return tensor if self.split is None else own_slice(tensor, self.split, self.place)

    def read_range(self, start: int, numel: int) -> Tensor:
        """Up to `numel` elements of the flat tensor from `start` on.

        No others are read from the file, but for a slice: that is cut from the whole tensor.
        """
        if self.split is None:
            return self.folder.read_range(self.name, start, numel)
        return self.read().flatten()[start : start + numel]


def find_sources(
    model: TrainingModel, config: TrainConfig, place: Place = ALONE
) -> dict[str, Source]:
    """By name of the model. Precedence: 1. checkpoint of another run, 2. consolidated folder,
    3. pretrained encoder, 4. nothing. At `place` a rank takes slices of what its group divides.

    Raises `ValueError` where names or shapes of the files do not fit the model; no value is read.
    """
    expected = set(model.state_dict())
    if config.init.from_run is not None:
        folder = ZeroCheckpoint(start_folder(config.init.from_run) / "generator")
        sources = {n: Source(folder, n) for n in folder.names() if n.startswith("vqrae.")}
        if model.teacher is not None:
            sources |= _teacher_of_run(folder)
    elif config.init.model is not None:
        folder = WeightFolder(config.init.model)
        record = find_record(folder.folder)
        _warn_of_rounding(folder, record)
        sources = {f"vqrae.{name}": Source(folder, name) for name in folder.names()}
        if model.teacher is not None:
            sources |= _teacher_of_folder(folder, record)
    elif config.init.encoder_weights is not None:
        folder = WeightFolder(config.init.encoder_weights)
        used = [name for name in folder.names() if not model.vqrae.encoder.leaves_out(name)]
        sources = {f"vqrae.encoder.model.{name}": Source(folder, name) for name in used}
        expected = {name for name in expected if name.startswith("vqrae.encoder.model.")}
    else:
        logger.warning("no encoder weights: the encoder is UNTRAINED, its features mean nothing")
        return {}
    check_names(expected, set(sources), folder.folder)
    if place.size > 1:
        sources = {n: s._replace(split=split_of(n), place=place) for n, s in sources.items()}
    _check_shapes(model, sources)
    return sources


def copy(targets: Mapping[str, Tensor], sources: Mapping[str, Source]) -> None:
    """Set those of the tensors that have a source. Raises `ValueError` as `Source.read` does."""
    for name, target in targets.items():
        if name in sources:
            target.data.copy_(sources[name].read())


def stored_tensors(model: nn.Module) -> dict[nn.Module, dict[str, Tensor]]:
    """The tensors of each module itself that a state dict holds, by their name in `model`."""
    stored = set(model.state_dict())
    found = {}
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        named = {f"{path}.{name}" if path else name: tensor for name, tensor in own}
        found[module] = {name: tensor for name, tensor in named.items() if name in stored}
    return found


@contextlib.contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Inside, new memory without a value is NaN: PyTorch's deterministic mode sees to it."""
    mode = torch.get_deterministic_debug_mode()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@torch.no_grad()
def poison(model: nn.Module, buffers: Collection[str]) -> None:
    """Set all parameters and the named buffers to NaN."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, share in _shares(model):
        if name in parameters or name in buffers:
            share.fill_(math.nan)


@torch.no_grad()
def check_filled(model: nn.Module) -> None:
    """Raise `AssertionError`, on all ranks together, naming every tensor that is not all finite.

    The weight files hold no such values (`Source.read`): it is our bug.
    """
    mine = [name for name, share in _shares(model) if not is_finite(share)]
    unfilled = {name: None for names in gather(mine) for name in names}
    assert not unfilled, f"no value was given to {', '.join(unfilled)}"


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Inside, memory of freed tensors goes back to the system at once.

    The C library keeps blocks of up to 32 MB, more of them with each that is freed: partitioning
    a model in host memory then leaves a process with more than the whole of it. Outside it keeps
    them, which is faster.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc; others do not keep blocks
    trim_threshold, mmap_threshold = -1, -3
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 20)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(mmap_threshold, 32 << 20)
            mallopt(trim_threshold, 64 << 20)


def _warn_of_rounding(folder: WeightFolder, record: Record | None) -> None:
    dtype = folder.read("decoder.head.weight").dtype
    if dtype == torch.float32:
        return
    if record is not None and record.kind == "stage2":
        why = "its run kept masters in"
    elif record is not None:
        why = "was converted for inference: it starts rounded to"
    else:
        why = "starts rounded to"
    logger.warning("%s: %s %s", folder.folder, why, str(dtype).removeprefix("torch."))


def _teacher_of_folder(folder: WeightFolder, record: Record | None) -> dict[str, Source]:
    """The encoder is the teacher: no conversion keeps one.

    Raises `ValueError` for a folder of stage 2: its encoder is not the first one any more.
    """
    if record is not None and record.stage == 2:
        raise ValueError(
            f"init.model: {folder.folder} is of stage 2, and its encoder is not the first one any "
            "more: name its run in init.from_run instead, which has the teacher if it learned from "
            "one, set losses.distillation to null, or start from stage 1"
        )
    encoder = "encoder."
    return {
        f"teacher.{n.removeprefix(encoder)}": Source(folder, n)
        for n in folder.names()
        if n.startswith(encoder)
    }


def _teacher_of_run(checkpoint: ZeroCheckpoint) -> dict[str, Source]:
    """A stage-2 checkpoint holds the teacher; before that stage the encoder is the teacher.

    Raises `ValueError` for a stage 2 that had none: its encoder is not the first one any more.
    """
    names = sorted(checkpoint.names())
    teacher = {n: Source(checkpoint, n) for n in names if n.startswith("teacher.")}
    step_folder = checkpoint.folder.parent
    if not teacher and read_manifest(step_folder).stage == 2:
        raise ValueError(
            f"init.from_run: {step_folder} was trained without a teacher, and its encoder is not "
            "the first one any more: set losses.distillation to null, or start from stage 1"
        )
    encoder = "vqrae.encoder."
    return teacher or {
        f"teacher.{n.removeprefix(encoder)}": Source(checkpoint, n)
        for n in names
        if n.startswith(encoder)
    }


def start_folder(from_run: str) -> Path:
    """What `init.from_run` names once it is resolved."""
    folder = Path(from_run)
    assert (folder / MANIFEST_NAME).is_file(), "checkpoint.resolve_start names the step folder"
    return folder


def _shares(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What this rank holds of each tensor of floats, by name."""
    for name, parameter in model.named_parameters():
        share = getattr(parameter, "ds_tensor", None)
        if share is None:
            yield name, parameter.data
        else:  # under ZeRO-3 a rank has a flat piece of each; the last ones are padded
            start = parameter.ds_zero_partition_rank * share.ds_numel
            yield name, share.data[: max(parameter.ds_numel - start, 0)]
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer.data


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raise `ValueError` where a tensor that was read from `file` holds NaN or infinity."""
    if not is_finite(tensor):
        raise ValueError(
            f"{name} in {file} holds NaN or infinity: the file is damaged or of a run that "
            "diverged, take another"
        )


def _check_shapes(model: nn.Module, sources: Mapping[str, Source]) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in sources:
            check_shape(sources[name].folder, sources[name].name, whole_shape(tensor))
