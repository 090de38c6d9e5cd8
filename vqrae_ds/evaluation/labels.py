"""Classes of the images of a data set, from the members beside them in their shards.

KEY.cls is a class as text; of KEY.json one field is it. The index passes both over, so the headers
of the shards are read once more, and of the members nothing but these.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqrae_ds.data.index import Shard, ShardIndex
from vqrae_ds.data.shard_scan import MemberName, RefusedMember, image_name
from vqrae_ds.data.tar_members import ForwardReader, Member, read_members

logger = logging.getLogger(__name__)

MAX_LABEL_BYTES = 1 << 20


class Labels(NamedTuple):
    """`labels_n` int64, -1 where an image has none; `names` of the classes 0, 1, ..."""

    labels_n: Tensor
    names: list[str]


def read_labels(
    index: ShardIndex, field: str, *, num_images: int | None = None, skip_bad: bool = False
) -> Labels | None:
    """The classes of the first `num_images` of an index, or None where not one has a class.

    By default they are those of all; no shard behind them is opened. A `.cls` member goes before
    the `field` of a `.json` one. Raises `ValueError` for a member that cannot be understood, and
    for a shard that is damaged or missing; with `skip_bad` what is behind such a place in its shard
    has no class.
    """
    limit = min(num_images or index.num_samples, index.num_samples)
    found: list[str | None] = []
    for number, shard in enumerate(index.shards):
        if len(found) >= limit:
            break
        by_key: dict[str, str] = {}
        try:
            for key, label in _labels_of(shard, field):
                by_key[key] = label
        except (ValueError, OSError) as error:
            message = f"no labels are read from {shard.path}: {error}"
            if not skip_bad:
                raise ValueError(message) from error
            logger.warning("%s", message)
        found += [by_key.get(key) for key in index.samples_of(number).keys]
    found = found[:limit]
    names = sorted({name for name in found if name is not None})
    if not names:
        return None
    number_of = {name: number for number, name in enumerate(names)}
    numbers = [-1 if name is None else number_of[name] for name in found]
    return Labels(torch.tensor(numbers), names)


def _labels_of(shard: Shard, field: str) -> Iterator[tuple[str, str]]:
    """Keys with their classes; a later class of a key is the one that counts."""
    from_cls: set[str] = set()
    with open(shard.path, "rb") as file:
        for member in read_members(ForwardReader(file, size=shard.size)):
            name = _companion(member)
            if name is None or (name.extension == "json" and name.key in from_cls):
                continue
            label = _label(file.fileno(), member, name.extension, field)
            if name.extension == "cls":
                from_cls.add(name.key)
            if label is not None:
                yield name.key, label


def _companion(member: Member) -> MemberName | None:
    """Key and extension of a member that may hold a class."""
    if member.is_folder:
        return None
    try:
        name = image_name(member)
    except RefusedMember:
        return None
    return name if name.extension in ("cls", "json") else None


def _label(descriptor: int, member: Member, kind: str, field: str) -> str | None:
    where = f"member {member.name!r}"
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"{where} has {member.size} bytes, a label at most {MAX_LABEL_BYTES}")
    data = os.pread(descriptor, member.size, member.offset)
    try:
        if kind == "cls":
            return data.decode().strip()
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, or nested without end
        raise ValueError(f"{where} cannot be read as a label: {error}") from error
    label = value.get(field) if isinstance(value, dict) else None
    if label is None or isinstance(label, str | int):
        return None if label is None else str(label)
    raise ValueError(f"{where}: the field {field!r} is {label!r}, neither text nor a whole number")
