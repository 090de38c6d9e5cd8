"""A checkpoint folder of the trainer -> a folder of safetensors, for stage 2 or for inference.

What is stored, in which dtype:

    tensor              stage2                        inference
    trained parameter   the fp32 master, or its       the same, cast to `dtype`
                        moving average (`ema`)
    frozen parameter    as it was in training         cast to `dtype`
                        (bf16 runs have no more)
    float buffer        fp32                          fp32: they are feature statistics
    integer buffer      as it is                      as it is
    discriminator       discriminator.safetensors     left out
    teacher             left out                      left out

Beside the weights: `config.json` (the model's, unchanged) and `conversion.json` (the source).
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vqrae_ds.conversion.output_folder import check_free, new_folder, progress_bar, sync
from vqrae_ds.conversion.rank_files import AVERAGE_FILES, FROZEN_FILE
from vqrae_ds.conversion.safetensors_stream import StreamedTensor, compare, write_file, write_model
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.manifest import (
    MANIFEST_NAME,
    Manifest,
    find_damage,
    hash_file,
    read_manifest,
    write_json_atomically,
)

Target = Literal["stage2", "inference"]

_RECORD_NAME = "conversion.json"
_MODEL_PREFIX, _TEACHER_PREFIX = "vqrae.", "teacher."
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def consolidate(
    checkpoint: Path,
    output: Path,
    *,
    to: Target,
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    max_shard_bytes: int = 4 << 30,
    progress: bool = False,
) -> None:
    """Convert the step folder `checkpoint` into the new folder `output`.

    With `ema` the moving averages of the trained weights are taken instead of the weights; the
    discriminator has none and stays as it is. Memory stays at a few MB whatever the size of the
    model. `output` appears, complete and synced, by a rename at the end. Raises `ValueError`,
    before anything is written, when `output` is there, when `dtype` is not float32 (or bfloat16,
    for inference), when there is no average to take, and when the checkpoint is incomplete or
    damaged, listing its damaged files.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_free(output)
    _check_request(to, dtype)
    _check_intact(checkpoint, read_manifest(checkpoint))
    weights = _select_weights(checkpoint, to, dtype, ema)
    total = sum(tensor.num_bytes for tensors in weights.values() for tensor in tensors)

    with new_folder(output) as folder:
        with progress_bar(total, "writing", progress) as bar:
            write_model(folder, weights["model"], max_shard_bytes, bar.update)
            if "discriminator" in weights:
                path = folder / "discriminator.safetensors"
                write_file(path, weights["discriminator"], bar.update)
        shutil.copyfile(checkpoint / "model_config.json", folder / "config.json")
        sync(folder / "config.json")
        write_json_atomically(folder / _RECORD_NAME, _describe(checkpoint, to, dtype, ema))


def verify(checkpoint: Path, output: Path, *, progress: bool = False) -> None:
    """Prove that `output` is the conversion of `checkpoint`: every tensor once, equal in every bit.

    Raises `ValueError` listing what differs. The checkpoint is not hashed again, so this is for
    right after `consolidate`, which did.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    record = json.loads((output / _RECORD_NAME).read_text())
    to, dtype, ema = record.get("kind"), _DTYPES.get(record.get("dtype")), record.get("ema")
    if record != _describe(checkpoint, to, dtype, ema):
        raise ValueError(f"{output} was not converted from {checkpoint}, by its {_RECORD_NAME}")
    weights = _select_weights(checkpoint, to, dtype, ema)
    total = sum(tensor.num_bytes for tensors in weights.values() for tensor in tensors)
    differences = []
    with progress_bar(total, "verifying", progress) as bar:
        for stem, tensors in weights.items():
            differences += compare(output, stem, tensors, bar.update)
    if (output / "config.json").read_bytes() != (checkpoint / "model_config.json").read_bytes():
        differences.append("config.json is not the checkpoint's model_config.json")
    if differences:
        raise ValueError(f"{output} is not what {checkpoint} holds: {'; '.join(differences)}")


def _check_intact(checkpoint: Path, manifest: Manifest) -> None:
    """Every file of the manifest is as it was written, and it vouches for every file we read."""
    damage = find_damage(checkpoint, manifest)
    patterns = ("*/*_states.pt", f"*/{FROZEN_FILE}", AVERAGE_FILES)
    found = (path for pattern in patterns for path in checkpoint.glob(pattern))
    needed = {"model_config.json", *(p.relative_to(checkpoint).as_posix() for p in found)}
    damage += [f"{name} is not in the manifest" for name in sorted(needed - manifest.files.keys())]
    if damage:
        raise ValueError(f"{checkpoint} is damaged: {'; '.join(damage)}")


def _check_request(to: Target, dtype: torch.dtype) -> None:
    if to not in get_args(Target):
        raise ValueError(f"cannot convert to {to!r}: choose one of {', '.join(get_args(Target))}")
    if dtype not in _DTYPES.values():
        raise ValueError(f"cannot store {dtype}: choose one of {', '.join(_DTYPES)}")
    if to == "stage2" and dtype != torch.float32:
        raise ValueError(
            f"stage2 keeps the fp32 masters to train on from: {dtype} is for inference"
        )


def _select_weights(
    checkpoint: Path, to: Target, dtype: torch.dtype, ema: bool
) -> dict[str, list[StreamedTensor]]:
    """What is written under which file stem, in the order of the checkpoint."""
    cast = dtype if to == "inference" else None
    generator = ZeroCheckpoint(checkpoint / "generator", averages=ema)
    weights: dict[str, list[StreamedTensor]] = {"model": []}
    for name in generator.tensors:
        if name.startswith(_MODEL_PREFIX):
            short_name = name.removeprefix(_MODEL_PREFIX)
            weights["model"].append(_stream(generator, name, short_name, cast))
        elif not name.startswith(_TEACHER_PREFIX):
            raise ValueError(
                f"{generator.folder} holds {name}, of neither the model nor its teacher"
            )
    if to == "stage2" and (checkpoint / "discriminator").is_dir():
        discriminator = ZeroCheckpoint(checkpoint / "discriminator")
        names = discriminator.tensors
        weights["discriminator"] = [_stream(discriminator, name, name, None) for name in names]
    return weights


def _stream(
    source: ZeroCheckpoint, name: str, new_name: str, cast: torch.dtype | None
) -> StreamedTensor:
    info = source.tensors[name]
    dtype = info.dtype
    if dtype.is_floating_point:
        if info.kind == "buffer":
            dtype = torch.promote_types(dtype, torch.float32)
        elif cast is not None:
            dtype = cast
    return StreamedTensor(new_name, info.shape, dtype, functools.partial(source.pieces, name))


def _describe(checkpoint: Path, to: Target, dtype: torch.dtype, ema: bool) -> dict[str, Any]:
    """The content of `conversion.json`."""
    manifest = read_manifest(checkpoint)
    return {
        "kind": to,
        "dtype": str(dtype).removeprefix("torch."),
        "ema": ema,
        "step": manifest.step,
        "stage": manifest.stage,
        "versions": manifest.versions,
        "source_manifest_xxh3_128": hash_file(checkpoint / MANIFEST_NAME).xxh3_128,
    }
