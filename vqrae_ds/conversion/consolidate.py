"""A checkpoint folder of the trainer -> a folder of safetensors, for stage 2 or for inference.

What is stored, in which dtype:

    tensor              stage2                        inference
    trained parameter   the master as it was (fp32,   the same, cast to `dtype`
                        or bf16), or its fp32 moving
                        average (`ema`)
    frozen parameter    as it was in training         cast to `dtype`
                        (bf16 runs have no more)
    float buffer        fp32                          fp32: they are feature statistics
    integer buffer      as it is                      as it is
    discriminator       discriminator.safetensors     left out
    teacher             left out                      left out

Beside the weights: `config.json` (the model's, unchanged), `conversion.json` (the source, and a
digest of every file), and for inference a card, README.md, which has no digest: it is to be filled
in. Checkpoints that plain DeepSpeed wrote are read as well: all is then the model's, or what has
the trainer's prefix `vqrae.`, held to the shapes of `model_config`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from vqrae_ds.config import ModelConfig, resolve_model
from vqrae_ds.config.checking import check as check_section
from vqrae_ds.config.files import read_json
from vqrae_ds.conversion.checkpoint_source import (
    CheckpointSource,
    describe_source,
    is_foreign,
    open_source,
    read_model_config,
)
from vqrae_ds.conversion.output_folder import check_free, check_space, new_folder
from vqrae_ds.conversion.progress import progress_bar
from vqrae_ds.conversion.record import RECORD_NAME, Record, find_damage, read_record, write_record
from vqrae_ds.conversion.safetensors_stream import StreamedTensor, compare, write_file, write_model
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.manifest import MANIFEST_NAME, FileRecord, hash_file, sync
from vqrae_ds.models.model_card import CARD, write_model_card
from vqrae_ds.models.weights import check_names, check_shape

logger = logging.getLogger(__name__)

Target = Literal["stage2", "inference"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MODEL_PREFIX, _TEACHER_PREFIX = "vqrae.", "teacher."


class _Selection(NamedTuple):
    """What is written by file stem, in the order of the checkpoint.

    `dtype` is what the trained parameters have in it.
    """

    files: dict[str, list[StreamedTensor]]
    dtype: torch.dtype


def consolidate(
    checkpoint: Path,
    output: Path,
    *,
    to: Target,
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    model_config: Path | None = None,
    max_shard_bytes: int = 4 << 30,
    check: Callable[[Path], object] | None = None,
    progress: bool = False,
) -> None:
    """Convert the folder `checkpoint` into the new folder `output`.

    `checkpoint` is as `checkpoint_source.find_checkpoint` gives it; `model_config` is needed for
    one that plain DeepSpeed wrote, and only there. `dtype` is for inference. With `ema` the moving
    averages of the trained weights are taken instead of the weights; the discriminator has none and
    stays as it is. Memory stays at a few MB whatever the size of the model. `output` appears,
    complete and synced, by a rename at the end; before it `check` may look at the folder under
    another name, and refuse it.

    Raises `ValueError`, before anything is written, when `output` is there or its disk too full,
    when `dtype` is not float32 (or bfloat16, for inference), when there is no average to take, and
    when the checkpoint is incomplete or damaged, listing its damaged files. Raises what `check`
    raises, and `OSError` when writing fails; then nothing of `output` is left.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_free(output)
    _check_request(to, dtype)
    source = open_source(checkpoint, model_config, progress=progress)
    if is_foreign(checkpoint):
        _check_fits_model(source, model_config)
    weights = _select_weights(source, to, dtype, ema)
    total = sum(tensor.num_bytes for tensors in weights.files.values() for tensor in tensors)
    check_space(output, total)

    with new_folder(output) as folder:
        with progress_bar(total, "writing", progress) as bar:
            files = write_model(folder, weights.files["model"], max_shard_bytes, bar.update)
            if "discriminator" in weights.files:
                path = folder / "discriminator.safetensors"
                files[path.name] = write_file(path, weights.files["discriminator"], bar.update)
        path = folder / "config.json"
        path.write_text(source.model_config)
        sync(path)
        files[path.name] = hash_file(path)
        if to == "inference":
            _write_card(folder)
        write_record(folder, _describe(source, to, weights.dtype, ema, files))
        if check is not None:
            check(folder)


def verify(
    checkpoint: Path, output: Path, *, model_config: Path | None = None, progress: bool = False
) -> None:
    """Prove that `output` is the conversion of `checkpoint`: every tensor once, equal in every bit.

    Raises `ValueError` listing what differs. The checkpoint is not hashed again, so this is for
    `consolidate`, which did, as its `check`.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    record = read_record(output)
    source = describe_source(checkpoint, model_config)
    to, ema = record.kind, record.ema
    dtype = DTYPES[record.dtype] if to == "inference" else torch.float32
    weights = _select_weights(source, to, dtype, ema)
    if record != _describe(source, to, weights.dtype, ema, record.files):
        raise ValueError(f"{output} was not converted from {checkpoint}, by its {RECORD_NAME}")
    total = sum(tensor.num_bytes for tensors in weights.files.values() for tensor in tensors)
    differences = []
    with progress_bar(total, "verifying", progress) as bar:
        for stem, tensors in weights.files.items():
            differences += compare(output, stem, tensors, bar.update)
    if (output / "config.json").read_text() != source.model_config:
        differences.append("config.json is not the checkpoint's model_config.json")
    differences = differences or find_damage(output, record, progress=progress)
    if differences:
        raise ValueError(f"{output} is not what {checkpoint} holds: {'; '.join(differences)}")


def _write_card(folder: Path) -> None:
    """Describe the model of `folder`, if this version can read its configuration."""
    try:
        raw = read_json(folder / "config.json", "the model's configuration")
        config = resolve_model(check_section(ModelConfig, raw))
    except ValueError as error:
        logger.warning("no %s: config.json does not describe a model: %s", CARD, error)
        return
    write_model_card(folder, config)
    sync(folder / CARD)


def model_prefix(generator: ZeroCheckpoint) -> str:
    """What stands before the model's names: nothing where no name begins as the trainer's do."""
    return _MODEL_PREFIX if any(n.startswith(_MODEL_PREFIX) for n in generator.tensors) else ""


def _check_fits_model(source: CheckpointSource, model_config: Path) -> None:
    """Names and shapes are those of the model; the trainer's own checkpoints are so by birth."""
    from vqrae_ds.models.vqrae import VQRAE  # its libraries are needed here alone

    generator = ZeroCheckpoint(source.generator)
    prefix = model_prefix(generator)
    with torch.device("meta"):
        model = VQRAE(config=read_model_config(model_config))
    expected = {prefix + name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {n for n in generator.names() if not (prefix and n.startswith(_TEACHER_PREFIX))}
    check_names(set(expected), found, source.folder)
    for name, shape in expected.items():
        check_shape(generator, name, shape)


def _check_request(to: Target, dtype: torch.dtype) -> None:
    if to not in get_args(Target):
        raise ValueError(f"cannot convert to {to!r}: choose one of {', '.join(get_args(Target))}")
    if dtype not in DTYPES.values():
        raise ValueError(f"cannot store {dtype}: choose one of {', '.join(DTYPES)}")
    if to == "stage2" and dtype != torch.float32:
        raise ValueError(
            f"stage2 keeps the masters as they are, to train on from: {dtype} is for inference"
        )


def _select_weights(
    source: CheckpointSource, to: Target, dtype: torch.dtype, ema: bool
) -> _Selection:
    """The tensors of the request, none of them read yet."""
    cast = dtype if to == "inference" else None
    generator = ZeroCheckpoint(source.generator, averages=ema)
    prefix = model_prefix(generator) if source.manifest is None else _MODEL_PREFIX
    weights: dict[str, list[StreamedTensor]] = {"model": []}
    for name in generator.tensors:
        if name.startswith(prefix):
            short_name = name.removeprefix(prefix)
            weights["model"].append(_stream(generator, name, short_name, cast))
        elif not name.startswith(_TEACHER_PREFIX):
            raise ValueError(
                f"{generator.folder} holds {name}, of neither the model nor its teacher"
            )
    if to == "stage2" and source.discriminator is not None:
        discriminator = ZeroCheckpoint(source.discriminator)
        names = discriminator.tensors
        weights["discriminator"] = [_stream(discriminator, name, name, None) for name in names]
    trained = (info.dtype for info in generator.tensors.values() if info.kind == "trainable")
    return _Selection(weights, cast or next(trained, dtype))


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


def _describe(
    source: CheckpointSource,
    to: Target,
    dtype: torch.dtype,
    ema: bool,
    files: Mapping[str, FileRecord],
) -> Record:
    described = (to, str(dtype).removeprefix("torch."), ema)
    manifest = source.manifest
    if manifest is not None:
        digest = hash_file(source.folder / MANIFEST_NAME).xxh3_128
        return Record(
            *described, manifest.step, manifest.stage, manifest.versions, digest, dict(files)
        )
    generator = ZeroCheckpoint(source.generator)
    versions = {"deepspeed": generator.deepspeed_version}
    return Record(*described, generator.step, None, versions, None, dict(files))
