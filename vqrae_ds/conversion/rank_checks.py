"""What must be true of the files of one engine's ranks before a tensor is read out of them.

A checksum says that a file is what was written. These checks find what a checksum cannot: files of
two steps in one folder, a parameter of which two ranks hold the same part, a tensor that is not
there although its header says so.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from vqrae_ds.conversion.progress import progress_bar
from vqrae_ds.conversion.rank_files import Files, Masters, entry, load


def check_same_step(files: Files) -> int:
    """The number of steps that the engine had made. Raises `ValueError` where files differ in it.

    What the optimizer itself counts must be the same on all ranks too. Not every optimizer counts:
    plain SGD leaves nothing in a rank's optimizer file that tells one step from another.
    """
    steps = [entry(load(file), "global_steps", int, file) for file in files.models]
    counts = [optimizer_steps(file) for file in files.optimizers]
    for found, paths in ((steps, files.models), (counts, files.optimizers)):
        for value, file in zip(found, paths, strict=True):
            if value != found[0]:
                raise ValueError(
                    f"{file} is of another step than {paths[0].name}: {_show(value)} steps, not "
                    f"{_show(found[0])}"
                )
    return steps[0]


def check_step_of_manifest(files: Files, step: int, *, began_later: bool = False) -> None:
    """Raise `ValueError` where the engine's files are not of `step`, that of their manifest.

    An engine that `began_later`, as a discriminator may, has made fewer. A step that DeepSpeed
    skipped counts for the engine, and not for its optimizer.
    """
    state = load(files.models[0])
    found = entry(state, "global_steps", int, files.models[0])
    if found > step or (found < step and not began_later):
        raise ValueError(f"{files.models[0]} is of step {found}, the manifest is of step {step}")
    skipped = entry(state, "skipped_steps", int, files.models[0]) if "skipped_steps" in state else 0
    taken = optimizer_steps(files.optimizers[0])
    if taken and taken != {float(found - skipped)}:
        raise ValueError(
            f"{files.optimizers[0]} has made {_show(taken)} steps, {files.models[0].name} "
            f"{found - skipped}: they are of different checkpoints"
        )


def optimizer_steps(file: Path) -> set[float]:
    """The steps that a rank's optimizer counts, one number as a rule; empty where it counts none.

    ZeRO-3 keeps PyTorch's optimizer state under `optimizer_state_dict`, ZeRO-1 and 2 under
    `base_optimizer_state` (DeepSpeed 0.19.8, runtime/zero/stage3.py and stage_1_and_2.py).
    """
    state = entry(load(file), "optimizer_state_dict", dict, file)
    for key in ("optimizer_state_dict", "base_optimizer_state"):
        inner = state.get(key)
        if isinstance(inner, dict) and isinstance(inner.get("state"), dict):
            return {
                float(values["step"])
                for values in inner["state"].values()
                if isinstance(values, dict) and "step" in values
            }
    return set()


def check_addresses(masters: list[Masters], files: list[Path]) -> None:
    """ZeRO-1 and 2: every element of a rank's vector belongs to one parameter at most, and a
    parameter that is cut goes on at the begin of the next rank's vector.

    With the number of elements, which the reader compares with the shape, this proves that each
    element of a parameter is read once, and in order. Raises `ValueError`, naming the file.
    """
    for rank, file in zip(masters, files, strict=True):
        for group in rank.addresses:
            end, before = 0, ""
            for start, numel, name in sorted((a.start, a.numel, n) for n, a in group.items()):
                if numel and start < end:
                    raise ValueError(f"{file} holds {before} and {name} at the same place")
                end, before = max(end, start + numel), name
    for (rank, after), file in zip(pairwise(masters), files, strict=False):
        for flat, group, following in zip(
            rank.flats, rank.addresses, after.addresses, strict=False
        ):
            for name, (start, numel) in group.items():
                rest = following.get(name)
                goes_on = numel and rest is not None and rest.numel
                if goes_on and (start + numel != flat.numel() or rest.start != 0):
                    raise ValueError(f"{file} has a gap between its part of {name} and the next")


def check_stored(name: str, tensor: Any, folder: Path) -> None:
    """Raise `ValueError` unless `tensor` is a plain one whose every element is in its file.

    A header may claim any shape over few bytes: to read such a tensor would fill the memory.
    """
    is_plain = (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
    )
    if not is_plain:
        raise ValueError(f"{folder}: {name} is no plain tensor: refused")
    if tensor.untyped_storage().nbytes() < math.prod(tensor.shape) * tensor.dtype.itemsize:
        raise ValueError(
            f"{folder}: {name} claims {tuple(tensor.shape)}, its file holds less: refused"
        )


def find_crc_damage(files: Sequence[Path], *, progress: bool = False) -> list[str]:
    """A line for each file whose content is not that of the CRC-32 which PyTorch wrote beside it.

    All that there is where nobody kept checksums. It reads every byte.
    """
    damage, sizes = [], [file.stat().st_size for file in files]
    with progress_bar(sum(sizes), "checking", progress) as bar:
        for file, size in zip(files, sizes, strict=True):
            try:
                with zipfile.ZipFile(file) as archive:
                    record = archive.testzip()
            except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
                damage.append(f"{file} cannot be read: {error}")
            else:
                if record is not None:
                    damage.append(f"{file} is damaged: {record} does not match its CRC-32")
            bar.update(size)
    return damage


def _show(value: int | set[float]) -> str:
    if isinstance(value, int):
        return str(value)
    return ", ".join(f"{steps:g}" for steps in sorted(value)) or "no count of"
