"""The shard index: which images a folder of tar shards holds, and where their bytes lie.

A data set is a folder of uncompressed tar shards in the webdataset layout, and `index.json` written
last. The index gives random access without parsing a tar, and makes a lost sample visible where tar
readers end short without a word. Keys are labels only: no path is built from one. No member is
unpacked to disk or unpickled.
"""

from __future__ import annotations

import json
import logging
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vqrae_ds.manifest import hash_file, write_json_atomically

INDEX_NAME = "index.json"
FORMAT_VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
COMPANION_EXTENSIONS = ("json", "txt", "cls")
_COMPRESSED_SUFFIXES = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_END_OF_ARCHIVE_BYTES = 1024
_READ_BYTES = 1 << 24
_COLUMN_TYPES = {
    "keys": np.dtypes.StringDType(),
    "extensions": np.dtypes.StringDType(),
    "offsets": np.dtype(np.int64),
    "lengths": np.dtype(np.int64),
}

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One image: `length` bytes at byte `offset` of the file `shard`."""

    shard: Path
    key: str
    offset: int
    length: int


class Shard(NamedTuple):
    """One tar file and its n images in file order, as columns: an object each would not do."""

    file: str
    size: int  # bytes
    xxh3_128: str
    keys: np.ndarray  # (n,) strings, without the extension
    extensions: np.ndarray  # (n,) strings out of IMAGE_EXTENSIONS
    offsets: np.ndarray  # (n,) int64, of an image's first byte
    lengths: np.ndarray  # (n,) int64, bytes


class ShardIndex:
    """The images of a data set, numbered 0 .. num_samples - 1 in shard order."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Raises `ValueError` when `shards` hold no image at all."""
        self.folder = Path(folder)
        self.shards = tuple(shards)
        # Shard s holds the samples starts[s] .. starts[s + 1] - 1.
        self.starts = np.cumsum([0, *(len(shard.keys) for shard in self.shards)], dtype=np.int64)
        if self.num_samples == 0:
            raise ValueError(f"{folder} has no shard with images ({', '.join(IMAGE_EXTENSIONS)})")

    @property
    def samples_per_shard(self) -> np.ndarray:
        """(S,) int64."""
        return np.diff(self.starts)

    @property
    def num_samples(self) -> int:
        return int(self.starts[-1])

    def sample(self, number: int) -> Sample:
        """Where image `number` lies, by bisection over shards. Raises `IndexError` out of range."""
        if not 0 <= number < self.num_samples:
            raise IndexError(f"sample {number} of a data set of {self.num_samples}")
        s = int(np.searchsorted(self.starts, number, side="right")) - 1
        shard, i = self.shards[s], number - int(self.starts[s])
        path = self.folder / shard.file
        return Sample(path, str(shard.keys[i]), int(shard.offsets[i]), int(shard.lengths[i]))


def find_images(folder: Path) -> list[Path]:
    """All images below `folder`, by extension, sorted. Raises `ValueError` when there is none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder")
    suffixes = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    images = [p for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes and p.is_file()]
    if not images:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_EXTENSIONS)})")
    return sorted(images)


def write_shards(
    images: Sequence[Path], output: Path, *, samples_per_shard: int, root: Path
) -> ShardIndex:
    """Copy image files unchanged into shards of at most `samples_per_shard` images, and index them.

    Keys are the paths relative to `root`, without extension. The same files give the same bytes.
    Images are dealt out like cards, in sorted order, lest a folder a class become a shard a class.

    Raises `ValueError` when `output` is not empty, there is no image, or two would share a key.
    """
    output = Path(output)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: name another one, or remove it first")
    by_key: dict[str, Path] = {}
    for image in sorted(images):
        key = _key_of_file(image, root)
        if key in by_key:
            raise ValueError(f"{by_key[key]} and {image} share the key {key!r}: rename one of them")
        by_key[key] = image
    if not by_key:
        raise ValueError(f"no image to write to {output}")

    output.mkdir(parents=True, exist_ok=True)
    num_shards = math.ceil(len(by_key) / samples_per_shard)
    entries = list(by_key.items())
    for number in range(num_shards):
        _write_shard(output / f"{number:06d}.tar", entries[number::num_shards])
    return index_shards(output)


def index_shards(folder: Path) -> ShardIndex:
    """Index the tar shards that lie in `folder`, and write `index.json` there.

    The layout is webdataset's and img2dataset's: KEY.jpg, and KEY.json, KEY.txt and KEY.cls, which
    are passed over. Raises `ValueError` naming the shard that is compressed, truncated or damaged,
    or holds a member that is anything else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_COMPRESSED_SUFFIXES):
            raise ValueError(f"{path} is compressed: unpack it, shards must be plain .tar files")
    index = ShardIndex(folder, [_index_shard(path) for path in sorted(folder.glob("*.tar"))])
    shards = [
        shard._asdict() | {name: getattr(shard, name).tolist() for name in _COLUMN_TYPES}
        for shard in index.shards
    ]
    write_json_atomically(folder / INDEX_NAME, {"format_version": FORMAT_VERSION, "shards": shards})
    logger.info("%s: %d images in %d shards", folder, index.num_samples, len(index.shards))
    return index


def read_index(folder: Path) -> ShardIndex:
    """Read `index.json` of `folder` and check that its shards are there with the listed sizes.

    Raises `ValueError` naming the file that is missing, resized or cannot be understood.
    """
    path = Path(folder) / INDEX_NAME
    rebuild = f"run `python tools/make_shards.py --index-only {folder}`"
    if not path.is_file():
        raise ValueError(f"{folder} has no {INDEX_NAME}: if shards lie there, {rebuild}")
    try:
        payload: dict[str, Any] = json.loads(path.read_text())
        version = payload["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this code reads {FORMAT_VERSION}")
        shards = [_shard_from_columns(**fields) for fields in payload["shards"]]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable index ({error}): {rebuild}") from error
    for shard in shards:
        file = Path(folder) / shard.file
        if not file.is_file():
            raise ValueError(f"{file} is missing: bring it back, or {rebuild}")
        if file.stat().st_size != shard.size:
            found = f"{file} has {file.stat().st_size} bytes, the index says {shard.size}"
            raise ValueError(f"{found}: copy it again, or {rebuild}")
    return ShardIndex(folder, shards)


def _shard_from_columns(file: str, size: int, xxh3_128: str, **columns: list) -> Shard:
    arrays = {
        name: np.array(columns.pop(name), dtype=dtype) for name, dtype in _COLUMN_TYPES.items()
    }
    shard = Shard(file, size, xxh3_128, **arrays, **columns)
    ends = shard.offsets + shard.lengths
    if Path(file).name != file:
        raise ValueError(f"the shard name {file!r} leads out of the folder")
    if any(array.shape != (len(shard.keys),) for array in arrays.values()):
        raise ValueError(f"{file} has columns of different lengths")
    if (shard.offsets < 0).any() or (shard.lengths < 0).any() or (ends > size).any():
        raise ValueError(f"{file} has a sample outside its {size} bytes")
    return shard


def _key_of_file(image: Path, root: Path) -> str:
    """The path below `root`; the name loses its dots, as readers end a key at the first one."""
    relative = image.relative_to(root)
    return relative.with_name(relative.stem.replace(".", "_")).as_posix()


def _write_shard(path: Path, entries: Sequence[tuple[str, Path]]) -> None:
    # Imported here: webdataset brings torch along, which takes seconds, and reading needs neither.
    from webdataset import TarWriter

    # PAX adds a header of its own only to a name that the plain format has no room for.
    with (
        open(path, "wb") as file,
        TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer,
    ):
        for key, image in entries:
            writer.write({"__key__": key, image.suffix[1:].lower(): image.read_bytes()})


def _index_shard(path: Path) -> Shard:
    record = hash_file(path)
    images: dict[str, tarfile.TarInfo] = {}  # by key
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="strict") as tar:
            for member in tar:
                # Before tarfile moves on: a size that leads backwards has it read in a circle.
                if member.size < 0 or member.offset_data + member.size > record.size:
                    raise ValueError(f"member {member.name!r} ends past the end of the file")
                if member.isdir():
                    continue
                name = _split_member_name(member)
                if name.extension in COMPANION_EXTENSIONS:
                    continue
                if name.key in images:
                    raise ValueError(f"two images have the key {name.key!r}")
                images[name.key] = member
            end_of_members = tar.offset  # where tarfile saw no further header
        _check_end_of_archive(path, end_of_members)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a sound shard: {error}") from error
    return _shard_from_columns(
        path.name,
        record.size,
        record.xxh3_128,
        keys=list(images),
        extensions=[_split_member_name(member).extension for member in images.values()],
        offsets=[member.offset_data for member in images.values()],
        lengths=[member.size for member in images.values()],
    )


class _MemberName(NamedTuple):
    key: str
    extension: str  # lower case


def _split_member_name(member: tarfile.TarInfo) -> _MemberName:
    """Divide a member's name at the first dot of its last part, as webdataset does."""
    folder, slash, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    is_plain_file = member.isreg() and not member.issparse()
    known = extension.lower() in (*IMAGE_EXTENSIONS, *COMPANION_EXTENSIONS)
    if not (stem and is_plain_file and known):
        allowed = ", ".join((*IMAGE_EXTENSIONS, *COMPANION_EXTENSIONS))
        raise ValueError(f"member {member.name!r} is refused, it must be a file KEY.({allowed})")
    return _MemberName(folder + slash + stem, extension.lower())


def _check_end_of_archive(path: Path, end_of_members: int) -> None:
    """Only the end mark and zeros may follow the members: tarfile stops silently at anything."""
    with open(path, "rb") as file:
        file.seek(end_of_members)
        num_bytes = 0
        while chunk := file.read(_READ_BYTES):
            if chunk.count(0) < len(chunk):
                raise ValueError(f"no tar header and no end of archive at byte {end_of_members}")
            num_bytes += len(chunk)
    if num_bytes < _END_OF_ARCHIVE_BYTES:
        raise ValueError("it is truncated, its end-of-archive blocks are missing")
