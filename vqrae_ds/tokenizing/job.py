"""What makes two tokenizings the same: model, pictures, transform and precision.

The first rank that comes writes `job.json` into the folder of the codes; whoever comes later, now
or after a break, must be about the same. What only divides the work is no part of it: ranks, loader
processes, the batch size, and whether bad samples are skipped or refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from vqrae_ds.config import DataConfig, ModelConfig, check_image_size
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.manifest import hash_file, read_sealed, write_sealed
from vqrae_ds.models.vqrae import config_json, read_config
from vqrae_ds.models.weights import weight_files
from vqrae_ds.tokenizing.code_shard import MAX_CODES, Source

JOB_NAME = "job.json"
FORMAT_VERSION = 1
TRANSFORM = "largest centre square, antialiased bicubic to image_size, RGB in [0, 1]"


class Job(NamedTuple):
    """`data_xxh3_128` is of name, size, checksum and count of every image shard, in their order."""

    config_xxh3_128: str  # of the model
    weights_xxh3_128: str
    num_codes: int
    image_size: int  # pixels
    grid: list[int]  # h, w
    dtype: str  # of the model as it encodes: bf16 or fp32
    transform: str
    max_image_bytes: int
    max_image_pixels: int
    num_shards: int
    num_samples: int
    data_xxh3_128: str

    @property
    def digest(self) -> str:
        """XXH3-128 of all fields: what a file of codes says it is from."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self._asdict(), sort_keys=True).encode())


def make_job(
    model: Path,
    config: ModelConfig,
    index: ShardIndex,
    data: DataConfig,
    *,
    image_size: int | None,
    dtype: str,
) -> Job:
    """The job of a model's folder, whose weights are read once for their checksum, and an index.

    Raises `ValueError` where the model has more codes than uint16 tells apart, or takes no images
    of `image_size` (default: the size that it was trained at).
    """
    check_num_codes(config.num_embeddings)
    size, q = image_size or config.image_size, config.output_patch_size
    check_image_size(size, q)
    sources = json.dumps([source_of(index, number) for number in range(len(index.shards))])
    config_digest, weights_digest = _model_digests(model, config)
    return Job(
        config_xxh3_128=config_digest,
        weights_xxh3_128=weights_digest,
        num_codes=config.num_embeddings,
        image_size=size,
        grid=[size // q, size // q],
        dtype=dtype,
        transform=TRANSFORM,
        max_image_bytes=data.max_image_bytes,
        max_image_pixels=data.max_image_pixels,
        num_shards=len(index.shards),
        num_samples=index.num_samples,
        data_xxh3_128=xxhash.xxh3_128_hexdigest(sources.encode()),
    )


def check_model(model: Path, output: Path, job: Job) -> None:
    """Raise `ValueError` where the codes of a folder are not of this model."""
    if _model_digests(model, read_config(model)) != (job.config_xxh3_128, job.weights_xxh3_128):
        raise ValueError(f"{output} has codes of another model than {model}: name that one")


def _model_digests(model: Path, config: ModelConfig) -> tuple[str, str]:
    """Of its configuration, and of the content of its weight files."""
    weights = " ".join(hash_file(path).xxh3_128 for path in weight_files(model))
    texts = (config_json(config), weights)
    return tuple(xxhash.xxh3_128_hexdigest(text.encode()) for text in texts)


def check_num_codes(num_codes: int) -> None:
    """Raise `ValueError` where uint16 cannot tell the codes apart."""
    if num_codes > MAX_CODES:
        raise ValueError(
            f"the model has {num_codes} codes, and files of codes hold uint16, which tells "
            f"{MAX_CODES} apart: train with model.num_embeddings up to that, or keep what "
            "model.encode_to_indices gives, int64, in a format of your own"
        )


def source_of(index: ShardIndex, number: int) -> Source:
    """An image shard as its codes remember it. Its folder may be moved: it is no part of it."""
    shard = index.shards[number]
    return Source(shard.file, shard.size, shard.xxh3_128, shard.num_samples)


def begin_or_join(output: Path, job: Job) -> None:
    """Make the folder of a job, or find that it is one of the same job.

    Raises `ValueError` in one line where it is of another job, or holds other things.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / JOB_NAME
    if not path.exists():
        foreign = next((p for p in output.iterdir() if not _is_of_a_job(p.name)), None)
        # A rank that was first may have made the job and begun to work, since we looked for it.
        if foreign is not None and not path.exists():
            raise ValueError(f"{output} is not empty ({foreign.name}): name a new folder")
        # Of ranks that come at once one makes the name; it has its whole content from the start.
        partial = path.with_name(f".{JOB_NAME}.{uuid.uuid4().hex}")
        write_sealed(partial, {"format_version": FORMAT_VERSION, **job._asdict()})
        try:
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)
        finally:
            partial.unlink()
    check_same(output, read_job(output), job)


def read_job(output: Path) -> Job:
    """The job of a folder of codes. Raises `ValueError` where it is none, or is damaged."""
    path = Path(output) / JOB_NAME
    if not path.is_file():
        raise ValueError(f"{output} has no {JOB_NAME}: no folder of tools/tokenize_shards.py")
    try:
        payload: dict[str, Any] = read_sealed(path)
        version = payload.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format {version}, this code reads {FORMAT_VERSION}")
        return Job(**payload)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error


def check_same(output: Path, theirs: Job, ours: Job) -> None:
    """Raise `ValueError` naming what differs, the folder's value first."""
    pairs = zip(Job._fields, theirs, ours, strict=True)
    others = [f"{name} {there} there, {here} here" for name, there, here in pairs if there != here]
    if others:
        raise ValueError(
            f"{output} holds codes of another job ({'; '.join(others)}): name another folder, or "
            "give model, shards and options as they were"
        )


def _is_of_a_job(name: str) -> bool:
    """What another rank may have made a moment ago."""
    return name == JOB_NAME or name.startswith(f".{JOB_NAME}.")
