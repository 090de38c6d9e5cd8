"""Classes of the images of a data set, from the members beside them in their shards.

KEY.cls is a class as text; of KEY.json one field is it. The index passes both over, so the headers
of the shards are read once more, and of the members nothing but these.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import torch
from torch import Tensor

from vqrae_ds.data.index import Shard, ShardIndex
from vqrae_ds.data.shard_scan import MemberName, RefusedMember, image_name
from vqrae_ds.data.tar_members import BrokenTar, ForwardReader, Member, read_members

MAX_LABEL_BYTES = 1 << 20


class Labels(NamedTuple):
    """`labels_n` int64, -1 where an image has none; `names` of the classes 0, 1, ..."""

    labels_n: Tensor
    names: list[str]


def read_labels(index: ShardIndex, field: str) -> Labels | None:
    """The classes of the images of an index, or None where not one has a class.

    A `.cls` member goes before the `field` of a `.json` one. Raises `ValueError` for a member that
    cannot be understood, and for a shard that is damaged.
    """
    found: list[str | None] = []
    for number, shard in enumerate(index.shards):
        by_key = _labels_of(shard, field)
        found += [by_key.get(key) for key in index.samples_of(number).keys]
    names = sorted({name for name in found if name is not None})
    if not names:
        return None
    number_of = {name: number for number, name in enumerate(names)}
    numbers = [-1 if name is None else number_of[name] for name in found]
    return Labels(torch.tensor(numbers), names)


def _labels_of(shard: Shard, field: str) -> dict[str, str]:
    """The class of each key that has one."""
    by_key: dict[str, str] = {}
    with open(shard.path, "rb") as file:
        reader = ForwardReader(file, size=shard.size)
        try:
            for member in read_members(reader):
                name = _companion(member)
                if name is None or (name.extension == "json" and name.key in by_key):
                    continue
                label = _label(shard, file.fileno(), member, name.extension, field)
                if label is not None:
                    by_key[name.key] = label
        except BrokenTar as error:
            raise ValueError(f"{shard.path} is damaged, no labels are read: {error}") from error
    return by_key


def _companion(member: Member) -> MemberName | None:
    """Key and extension of a member that may hold a class."""
    if member.is_folder:
        return None
    try:
        name = image_name(member)
    except RefusedMember:
        return None
    return name if name.extension in ("cls", "json") else None


def _label(shard: Shard, descriptor: int, member: Member, kind: str, field: str) -> str | None:
    where = f"{shard.path}, member {member.name!r}"
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"{where} has {member.size} bytes, a label at most {MAX_LABEL_BYTES}")
    data = os.pread(descriptor, member.size, member.offset)
    try:
        if kind == "cls":
            return data.decode().strip()
        value = json.loads(data)
    except ValueError as error:  # what is not UTF-8, or no JSON
        raise ValueError(f"{where} cannot be read as a label: {error}") from error
    label = value.get(field) if isinstance(value, dict) else None
    if label is None or isinstance(label, str | int):
        return None if label is None else str(label)
    raise ValueError(f"{where}: the field {field!r} is {label!r}, neither text nor a whole number")
