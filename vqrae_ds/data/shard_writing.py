"""Puts a folder of images into tar shards in the webdataset layout, and indexes them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.sample_table import IMAGE_EXTENSIONS


def find_images(folder: Path) -> list[Path]:
    """All images below `folder`, by extension, sorted. Raises `ValueError` when there is none."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder")
    suffixes = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    images = [p for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes and p.is_file()]
    if not images:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_EXTENSIONS)})")
    return sorted(images)


def passed_over(folder: Path) -> Counter[str]:
    """How many files below `folder` have no extension of an image, by extension.

    A hidden file without one goes by its name, `.DS_Store` for example, any other is `other`.
    """
    taken = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    found: Counter[str] = Counter()
    for path in Path(folder).rglob("*"):
        if path.suffix.lower() not in taken and path.is_file():
            hidden = path.name if path.name.startswith(".") else "other"
            found[path.suffix.lower() or hidden] += 1
    return found


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
