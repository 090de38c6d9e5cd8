"""Frozen weights: the pretrained ones are written once a run, all others with every checkpoint.

    RUN/frozen/DIGEST.safetensors                   the frozen encoder, or the teacher
    RUN/checkpoints/step_X/generator/frozen.safetensors     SimVQ's codebook above all

With InternViT-6B the former are 11 GB that no step changes. The manifest of each checkpoint refers
to them by size and digest. The names are those in the module of the generator's engine, also where
a part is resident and so outside of the module's tree; the dtype is the engine's. DeepSpeed's own
files have neither: it is told to leave frozen parameters out, and takes the codebook for one.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from vqrae_ds import watchdog
from vqrae_ds.checkpoint.writing import RankWriter
from vqrae_ds.config import Run
from vqrae_ds.conversion.rank_files import FROZEN_FILE
from vqrae_ds.conversion.safetensors_stream import (
    StreamedTensor,
    in_file_order,
    record_of,
    write_file,
)
from vqrae_ds.manifest import FileRecord, frozen_file, hash_file, sync
from vqrae_ds.parallel.groups import Groups, merge_over_group
from vqrae_ds.parallel.marks import whole_shape
from vqrae_ds.parallel.slices import Split, split_of
from vqrae_ds.ranks import failing_together, from_rank_0
from vqrae_ds.sharding import resident
from vqrae_ds.sharding.first_weights import freed_memory_returned

PRETRAINED = ("vqrae.encoder.", "teacher.")  # prefixes of names
_PIECE_ELEMENTS = 1 << 20

logger = logging.getLogger(__name__)

Made = TypeVar("Made")


class _Weight(NamedTuple):
    """A tensor, partitioned or whole, and the shape of the whole; `groups` divide it by `split`."""

    tensor: Tensor
    shape: tuple[int, ...]
    split: Split | None
    groups: Groups | None


def write_pretrained(run: Run, engine: Any, known: FileRecord | None = None) -> FileRecord | None:
    """Write the run's file of frozen pretrained weights; all ranks call it, and get its record.

    None where nothing pretrained is frozen. Nothing is written where the file is there: by its
    size where its record is `known`, else the weights are hashed first, and the file is read. It
    appears, synced, by a rename. An error of rank 0 is raised on all ranks together.
    """
    weights = {n: t for n, t in _frozen(engine).items() if n.startswith(PRETRAINED)}
    if not weights:
        return None
    folder = Path(run.config.run.output_dir)
    if known is not None and from_rank_0(lambda: _has_size(frozen_file(folder, known), known)):
        return known
    record = _on_rank_0(weights, record_of)
    path = frozen_file(folder, record)
    if not from_rank_0(lambda: _has_size(path, record) and hash_file(path) == record):
        _on_rank_0(weights, functools.partial(_publish, path))
        logger.info("frozen weights of the run: %s", path)
    return record


def write_others(writer: RankWriter, folder: Path, engine: Any) -> None:
    """Write all other frozen parameters into `folder`, that of the engine; all ranks call it.

    The writer of rank 0 keeps the record of the file, or what went wrong.
    """
    path = folder / FROZEN_FILE

    def write(tensors: list[StreamedTensor]) -> None:
        if writer.failure is None:
            with writer.attempt(path):
                record = write_file(path, tensors, _unheard)
                writer.records[path.relative_to(writer.folder).as_posix()] = record

    weights = _others(engine)
    if weights:
        _on_rank_0(weights, write)


def bytes_of_others(engine: Any) -> int:
    """What `write_others` writes on rank 0."""
    weights = _others(engine).values()
    return sum(math.prod(w.shape) * w.tensor.dtype.itemsize for w in weights)


def _others(engine: Any) -> dict[str, _Weight]:
    return {n: t for n, t in _frozen(engine).items() if not n.startswith(PRETRAINED)}


def _frozen(engine: Any) -> dict[str, _Weight]:
    """Frozen weights by name, in the same order on every rank."""
    model, groups = engine.module, engine.mpu
    inside = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    found = {}
    for name, tensor in (inside | resident.state(model)).items():
        split = None if groups is None else split_of(name)
        found[name] = _Weight(tensor, whole_shape(tensor), split, groups)
    return found


@freed_memory_returned()
def _on_rank_0(weights: dict[str, _Weight], use: Callable[[list[StreamedTensor]], Made]) -> Made:
    """What `use` makes of the weights on rank 0, on every rank.

    Its peers gather each weight along with it, one at a time: no rank ever holds them all.
    """

    def pieces() -> Iterator[Tensor]:
        for piece in next(wholes).reshape(-1).split(_PIECE_ELEMENTS):
            yield piece.cpu()

    tensors = [StreamedTensor(n, w.shape, w.tensor.dtype, pieces) for n, w in weights.items()]
    tensors = in_file_order(tensors)
    wholes = _each_whole([weights[tensor.name] for tensor in tensors])
    made = None
    with failing_together():
        try:
            if dist.get_rank() == 0:
                made = use(tensors)
        finally:
            for _ in wholes:  # what rank 0 leaves out when it fails its peers wait for
                pass
    return from_rank_0(lambda: made)


def _each_whole(weights: list[_Weight]) -> Iterator[Tensor]:
    from vqrae_ds.engines import gathered  # deepspeed reads the environment when it is imported

    for weight in weights:
        watchdog.progress()
        with gathered([weight.tensor]):
            own = weight.tensor.detach()
            yield own if weight.split is None else merge_over_group(own, *weight[1:])


def _publish(path: Path, tensors: list[StreamedTensor]) -> None:
    """Write the file; under its name there is the whole of it or nothing, after a crash too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        write_file(partial, tensors, _unheard)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
    sync(path.parent.parent)


def _unheard(written: int) -> None:
    """Nobody waits for the progress of it."""


def _has_size(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.size
