"""One file of codes: what the images of one shard became.

It is a safetensors file, so that any reader of that format takes it, and numpy maps it:

    codes    uint16 (N, h, w)  the codes of N images, each in [0, num_codes)
    numbers  int32 (N,)        where each image stands in its image shard, ascending
    crops    int32 (N, 5)      width and height of the upright image; left, top and side of the
                               square that was tokenized, in its pixels
    keys     uint8 (bytes,)    the keys of the N images in UTF-8, with a zero byte between two

Its metadata say which job and which image shard it is from, what made it, and which samples were
skipped. They begin with a seal, the XXH3-128 of the file in which the seal is zeros: a file that is
cut or has a changed byte is found out. No pickle; keys are labels, and never become paths.
Suffixes: N images, h x w grid of codes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

FORMAT_VERSION = 1
MAX_CODES = 1 << 16  # that uint16 tells apart
KEY_SEPARATOR = "\0"  # no name in a tar holds one
_LENGTH_BYTES = 8  # of the header's length, as safetensors has it
_MAX_HEADER_BYTES = 100_000_000  # safetensors reads no longer one
_BEFORE_SEAL = b'{"__metadata__": {"seal_xxh3_128": "'
_UNSEALED = b"0" * 32
_SEAL_AT = _LENGTH_BYTES + len(_BEFORE_SEAL)
_READ_BYTES = 1 << 22
_DTYPES = {"codes": "U16", "numbers": "I32", "crops": "I32", "keys": "U8"}
_NUMPY = {"U16": "<u2", "I32": "<i4", "U8": "u1"}
_ORDER = ("crops", "numbers", "codes", "keys")  # the widest first, so that each one is aligned


class Source(NamedTuple):
    """The image shard, as its index has it; `size` in bytes."""

    file: str
    size: int
    xxh3_128: str
    num_samples: int


class SkippedSample(NamedTuple):
    """A sample without codes: its place in its shard, and what is wrong (`data.faults`)."""

    number: int
    key: str
    kind: str


class Codes(NamedTuple):
    """The columns of a file."""

    codes_Nhw: np.ndarray  # uint16
    numbers_N: np.ndarray  # int32
    crops_N5: np.ndarray  # int32
    keys: list[str]


class Header(NamedTuple):
    """What a file says of itself; `made_with` has batch size, device and versions."""

    path: Path
    size: int  # bytes
    seal: str
    job: str  # digest of the job (`job.Job`)
    source: Source
    skipped: tuple[SkippedSample, ...]
    made_with: dict[str, Any]
    columns: dict[str, tuple[int, tuple[int, ...]]]  # where each begins in the file, its shape

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, h, w."""
        return self.columns["codes"][1]


def encode_shard(
    codes: Codes,
    *,
    job: str,
    source: Source,
    skipped: Sequence[SkippedSample],
    made_with: dict[str, Any],
) -> bytes:
    """The bytes of a file, sealed."""
    text = np.frombuffer(KEY_SEPARATOR.join(codes.keys).encode(), np.uint8)
    columns = {
        "codes": codes.codes_Nhw,
        "numbers": codes.numbers_N,
        "crops": codes.crops_N5,
        "keys": text,
    }
    metadata = {
        "seal_xxh3_128": _UNSEALED.decode(),
        "format_version": str(FORMAT_VERSION),
        "job": job,
        "source": json.dumps(source._asdict()),
        "skipped": json.dumps(skipped),
        "made_with": json.dumps(made_with, sort_keys=True),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    body, end = [], 0
    for name in _ORDER:
        data = columns[name].astype(_NUMPY[_DTYPES[name]], casting="equiv").tobytes()
        place = [end, end := end + len(data)]
        shape = list(columns[name].shape)
        header[name] = {"dtype": _DTYPES[name], "shape": shape, "data_offsets": place}
        body.append(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % _LENGTH_BYTES)
    assert head.startswith(_BEFORE_SEAL + _UNSEALED) and len(head) <= _MAX_HEADER_BYTES
    file = bytearray(len(head).to_bytes(_LENGTH_BYTES, "little") + head + b"".join(body))
    file[_SEAL_AT : _SEAL_AT + 32] = xxhash.xxh3_128_hexdigest(file).encode()
    return bytes(file)


def read_header(path: Path) -> Header:
    """What a file says of itself, without its columns.

    Raises `ValueError` where it cannot be such a file, or has not the length that it says, and
    `OSError` where the disk does not give it. Whether it was altered is what `is_sound` finds.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > min(size, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is no file of codes, or is cut")
        head = file.read(length)
    try:
        if not head.startswith(_BEFORE_SEAL):
            raise ValueError("it has no seal")
        fields = json.loads(head)
        metadata = fields.pop("__metadata__")
        if metadata["format_version"] != str(FORMAT_VERSION):
            version = metadata["format_version"]
            raise ValueError(f"format version {version}, this code reads {FORMAT_VERSION}")
        columns = {name: _column(fields[name], dtype) for name, dtype in _DTYPES.items()}
        ends = [fields[name]["data_offsets"][1] for name in _DTYPES]
        if _LENGTH_BYTES + length + max(ends) != size:
            raise ValueError("it has another length than it says")
        return Header(
            path,
            size,
            metadata["seal_xxh3_128"],
            metadata["job"],
            Source(**json.loads(metadata["source"])),
            tuple(SkippedSample(*fields) for fields in json.loads(metadata["skipped"])),
            json.loads(metadata["made_with"]),
            {n: (_LENGTH_BYTES + length + at, shape) for n, (at, shape) in columns.items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no file of codes, or is damaged: {error}") from error


def is_sound(header: Header) -> bool:
    """Whether the file still has every byte that was written; reads it once."""
    with open(header.path, "rb") as file:
        start = bytearray(file.read(_SEAL_AT + 32))
        start[_SEAL_AT:] = _UNSEALED
        digest = xxhash.xxh3_128(start)
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == header.seal


def map_codes(header: Header) -> np.ndarray:
    """The codes (N, h, w), uint16, read-only; the disk is read where they are looked at."""
    return _map(header, "codes")


def read_columns(header: Header) -> Codes:
    """All columns; the arrays are mapped and read-only."""
    keys = bytes(_map(header, "keys")).decode()
    return Codes(
        _map(header, "codes"),
        _map(header, "numbers"),
        _map(header, "crops"),
        keys.split(KEY_SEPARATOR) if header.shape[0] else [],
    )


def _map(header: Header, name: str) -> np.ndarray:
    offset, shape = header.columns[name]
    dtype = _NUMPY[_DTYPES[name]]
    if 0 in shape:  # nothing cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(header.path, dtype, "r", offset, shape)


def _column(field: dict[str, Any], dtype: str) -> tuple[int, tuple[int, ...]]:
    """Where it begins after the header, and its shape."""
    begin, end = field["data_offsets"]
    shape = tuple(field["shape"])
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(_NUMPY[dtype]).itemsize
    if field["dtype"] != dtype or end - begin != num_bytes or begin < 0 or min(shape) < 0:
        raise ValueError(f"a column is {field}")
    return begin, shape
