"""The members of a tar file, read once and forwards: bounded, nothing unpacked, no link followed.

The format is POSIX ustar (pax(1), "ustar Interchange Format") with PAX records and GNU's long
names. A reader of tar files in general ends silently where a header is damaged or the file is cut;
here that is an error, so that no sample is lost unnoticed. What is held in memory does not depend
on what a header claims.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

BLOCK = 512
MAX_NAME_BYTES = 1 << 16  # of PAX records and long names, which have to be held
_MAX_DIGITS = 20  # of a number in a PAX record; Python refuses to read one of thousands
_END_BLOCKS = 2
_READ_BYTES = 1 << 20
_ZEROS = bytes(BLOCK)
_PLAIN_FILES = (b"0", b"\0", b"7")
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _FOLDER = b"x", b"g", b"L", b"K", b"5"


class BrokenTar(ValueError):
    """The file ends too early (`is_cut`), or is damaged."""

    def __init__(self, message: str, *, is_cut: bool = False) -> None:
        super().__init__(message)
        self.is_cut = is_cut


class Member(NamedTuple):
    """A member: `size` bytes from byte `offset` of the tar on."""

    name: str
    offset: int
    size: int
    is_file: bool  # a plain file: neither a link nor a device, not sparse
    is_folder: bool


class Digest(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: bytes, /) -> object: ...


class ForwardReader:
    """A file that is read forwards; `position` is the next byte, `digest` gets all of them.

    Without a digest, what is passed over in a file with a `size` is not read.
    """

    def __init__(
        self, file: BinaryIO, *, size: int | None = None, digest: Digest | None = None
    ) -> None:
        self.size, self.position = size, 0
        self._file, self._digest = file, digest
        self._buffer, self._at = b"", 0

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer at the end of the file."""
        if self._at + count <= len(self._buffer):
            data = self._buffer[self._at : self._at + count]
            self._at += count
            self.position += count
            return data
        parts, missing = [], count
        while missing and (part := self._take(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def skip(self, count: int) -> None:
        """Pass over `count` bytes, or what is left of the file."""
        buffered = min(count, len(self._buffer) - self._at)
        self._at += buffered
        self.position += buffered
        count -= buffered
        if count > _READ_BYTES and self._digest is None and self.size is not None:
            count = min(count, self.size - self.position)
            self._file.seek(count, os.SEEK_CUR)
            self.position += count
            return
        while count and (part := self._take(count)):
            count -= len(part)

    def _take(self, count: int) -> bytes:
        """At most `count` bytes, and none only at the end of the file."""
        if self._at == len(self._buffer):
            self._buffer, self._at = self._file.read(_READ_BYTES), 0
            if self._digest is not None:
                self._digest.update(self._buffer)
        data = self._buffer[self._at : self._at + count]
        self._at += len(data)
        self.position += len(data)
        return data


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


def read_members(reader: ForwardReader) -> Iterator[Member]:
    """All members in file order. Between two of them the bytes of the first may be read.

    Raises `BrokenTar` where the file is cut or damaged: after all members that are whole.
    """
    records: dict[str, str] = {}  # of PAX and GNU, for the next member
    while True:
        start = reader.position
        block = reader.read(BLOCK)
        if block == _ZEROS:
            return _check_end(reader, start)
        header = _parse(block, start)
        if header.kind in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            _refuse_past_end(reader, header)
            if header.size > MAX_NAME_BYTES:
                raise BrokenTar(f"a name of {header.size} bytes at byte {start}")
            found = _extended(header.kind, reader.read(header.size), start)
            reader.skip(-header.size % BLOCK)
            records = found if header.kind == _PAX_GLOBAL else records | found
            continue
        size = _record_size(records, header.size, start)
        name = records.get("path", header.name)
        _refuse_past_end(reader, header._replace(name=name, size=size))
        is_sparse = any(key.startswith("GNU.sparse") for key in records)
        is_folder = header.kind == _FOLDER or (header.kind == b"\0" and name.endswith("/"))
        is_file = header.kind in _PLAIN_FILES and not is_sparse and not is_folder
        member = Member(name, reader.position, size, is_file, is_folder)
        yield member
        end = member.offset + size + -size % BLOCK
        reader.skip(end - reader.position)
        if reader.position < member.offset + size:
            raise BrokenTar(f"it is cut inside the member {name!r}", is_cut=True)
        records = {}


def _check_end(reader: ForwardReader, start: int) -> None:
    """Only zeros may follow the members, and two blocks of them at least."""
    num_bytes = BLOCK
    while chunk := reader.read(_READ_BYTES):
        if chunk.count(0) < len(chunk):
            raise BrokenTar(f"no tar header and no end of archive at byte {start}")
        num_bytes += len(chunk)
    if num_bytes < _END_BLOCKS * BLOCK:
        raise BrokenTar("it is cut, its end-of-archive blocks are missing", is_cut=True)


def _parse(block: bytes, start: int) -> _Header:
    if len(block) < BLOCK:
        where = f"it is cut at byte {start + len(block)}, before its end-of-archive blocks"
        raise BrokenTar(where, is_cut=True)
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if _number(block[148:156]) != unsigned:
        raise BrokenTar(f"no tar header and no end of archive at byte {start}")
    name = _text(block[:100], start)
    prefix = block[345:500] if block[257:263] == b"ustar\0" else b"\0"
    if prefix[0]:
        name = f"{_text(prefix, start)}/{name}"
    size = _number(block[124:136])
    if size is None:
        raise BrokenTar(f"the member {name!r} has no size")
    return _Header(name, size, block[156:157])


def _number(field: bytes) -> int | None:
    """An octal number, or GNU's base 256, which a set first bit tells; None if it is neither."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False)
        bits = 8 * len(field)
        # The first byte is 0x80 for numbers from zero on, 0xff for negative ones.
        return value - (1 << bits) if field[0] & 0x40 else value - (1 << (bits - 1))
    digits = field.strip(b" \0")
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return None


def _text(field: bytes, start: int) -> str:
    try:
        return field.partition(b"\0")[0].decode()
    except UnicodeDecodeError as error:
        raise BrokenTar(f"the name at byte {start} is no UTF-8") from error


def _extended(kind: bytes, data: bytes, start: int) -> dict[str, str]:
    """The records of a header that speaks of the member after it."""
    if kind == _LONG_NAME:
        return {"path": _text(data, start)}
    if kind == _LONG_LINK:
        return {}
    records = {}
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        is_number = length.isdigit() and len(length) <= _MAX_DIGITS
        if not is_number or not len(length) + 2 < int(length) <= len(data):
            raise BrokenTar(f"a PAX record that cannot be read at byte {start}")
        key, equals, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if not equals:
            raise BrokenTar(f"a PAX record that cannot be read at byte {start}")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            records[key.decode(errors="replace")] = _text(value, start)
        data = data[int(length) :]
    if kind == _PAX_GLOBAL and records:
        raise BrokenTar(f"a global record for {', '.join(records)} at byte {start}")
    return records


def _record_size(records: dict[str, str], size: int, start: int) -> int:
    if "size" not in records:
        return size
    text = records["size"]
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise BrokenTar(f"a PAX record that cannot be read at byte {start}")
    return int(text)


def _refuse_past_end(reader: ForwardReader, header: _Header) -> None:
    """A size that leads backwards would have the file read in a circle, or none at all."""
    is_past = reader.size is not None and reader.position + header.size > reader.size
    if header.size < 0 or is_past:
        raise BrokenTar(
            f"member {header.name!r} ends past the end of the file", is_cut=header.size >= 0
        )
