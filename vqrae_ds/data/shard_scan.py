"""One tar shard to its entry in an index: read once, every member judged by name and kind.

The layout is webdataset's and img2dataset's: KEY.jpg, and KEY.json, KEY.txt and KEY.cls, which are
passed over. Nothing else belongs in a shard: a member that could hold code is refused unread.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import xxhash

from vqrae_ds.data.faults import (
    CUT_SHARD,
    DAMAGED_SHARD,
    DUPLICATE_KEY,
    MISSING_SHARD,
    REFUSED_MEMBER,
    UNREADABLE,
)
from vqrae_ds.data.sample_table import IMAGE_EXTENSIONS, MAX_LENGTH, encode_samples
from vqrae_ds.data.tar_members import BrokenTar, ForwardReader, Member, read_members

COMPANION_EXTENSIONS = ("json", "txt", "cls")
COMPRESSED_SUFFIXES = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
# What may be left out of an index beside the kinds of `faults`, where it is not refused.
COMPRESSED_SHARD = "compressed_shard"


class ScannedShard(NamedTuple):
    """What an index says of one shard, and its table of samples."""

    file: str
    size: int  # bytes
    mtime_ns: int  # when it was changed last, before it was read
    xxh3_128: str
    num_samples: int
    left_out: dict[str, int]  # by kind
    table: bytes
    first_fault: str  # empty where nothing was left out


class MemberName(NamedTuple):
    """A member's name, divided at the first dot of its last part, as webdataset does."""

    key: str
    extension: str  # lower case


class RefusedMember(ValueError):
    """A member that has no place in a shard, for the reason `kind`."""

    def __init__(self, message: str, kind: str = REFUSED_MEMBER) -> None:
        super().__init__(message)
        self.kind = kind


def scan_shard(path: Path, *, skip_bad: bool = False) -> ScannedShard:
    """Read the shard at `path` from its first byte to its last.

    Raises `ValueError` naming shard and member at the first fault, and `OSError` naming the shard
    where it cannot be read. With `skip_bad` the member is left out and counted, of a shard that is
    cut or damaged what is whole before that is kept, and of one that cannot be read, nothing.
    """
    path, size, mtime_ns = Path(path), 0, 0
    try:
        found = path.stat()
        size, mtime_ns = found.st_size, found.st_mtime_ns
        if path.name.endswith(COMPRESSED_SUFFIXES):
            error = ValueError(f"{path} is compressed: unpack it, shards must be plain .tar files")
            if not skip_bad:
                raise error
            return _nothing_of(path, size, mtime_ns, COMPRESSED_SHARD, error)
        return _read_shard(path, size, mtime_ns, skip_bad=skip_bad)
    except OSError as error:
        named = OSError(error.errno, error.strerror, str(path))  # an error of reading has no name
        if not skip_bad:
            raise named from error
        kind = MISSING_SHARD if isinstance(error, FileNotFoundError) else UNREADABLE
        return _nothing_of(path, size, mtime_ns, kind, named)


def _nothing_of(path: Path, size: int, mtime_ns: int, kind: str, error: Exception) -> ScannedShard:
    """A shard that is left out whole."""
    table = encode_samples([], [], [], [])
    return ScannedShard(path.name, size, mtime_ns, "", 0, {kind: 1}, table, str(error))


def _read_shard(path: Path, size: int, mtime_ns: int, *, skip_bad: bool) -> ScannedShard:
    left_out: Counter[str] = Counter()
    faults: list[str] = []
    names, images = ImageNames(), {}  # members by key

    def leave_out(kind: str, error: ValueError) -> None:
        message = f"{path} is not a sound shard: {error}"
        if not skip_bad:
            raise ValueError(message) from error
        left_out[kind] += 1
        faults.append(message)

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        reader = ForwardReader(file, size=size, digest=digest)
        try:
            for member in read_members(reader):
                try:
                    if (key := names.key_of_image(member)) is not None:
                        images[key] = member
                except RefusedMember as error:
                    leave_out(error.kind, error)
        except BrokenTar as error:
            leave_out(CUT_SHARD if error.is_cut else DAMAGED_SHARD, error)
            reader.skip(size)  # the checksum is of the whole file
    table = encode_samples(
        list(images),
        [image_name(member).extension for member in images.values()],
        [member.offset for member in images.values()],
        [member.size for member in images.values()],
    )
    read = digest.hexdigest(), len(images), dict(left_out), table
    return ScannedShard(path.name, size, mtime_ns, *read, faults[0] if faults else "")


def image_name(member: Member) -> MemberName:
    """Key and extension. Raises `RefusedMember` for what is neither an image nor a companion."""
    folder, slash, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    known = extension.lower() in (*IMAGE_EXTENSIONS, *COMPANION_EXTENSIONS)
    if not (stem and member.is_file and known):
        allowed = ", ".join((*IMAGE_EXTENSIONS, *COMPANION_EXTENSIONS))
        refused = f"member {member.name!r} is refused, it must be a file KEY.({allowed})"
        raise RefusedMember(refused)
    return MemberName(folder + slash + stem, extension.lower())


class ImageNames:
    """The keys of the images of one shard, none of them twice."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    def key_of_image(self, member: Member) -> str | None:
        """The key of an image; None for a folder or a companion. Raises `RefusedMember`."""
        if member.is_folder:
            return None
        name = image_name(member)
        if name.extension in COMPANION_EXTENSIONS:
            return None
        if name.key in self._keys:
            raise RefusedMember(f"two images have the key {name.key!r}", DUPLICATE_KEY)
        if "\0" in name.key or member.size > MAX_LENGTH:
            refused = f"member {member.name!r} has {member.size} bytes, or a zero in its name"
            raise RefusedMember(refused)
        self._keys.add(name.key)
        return name.key
