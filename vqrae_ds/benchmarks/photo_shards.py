"""Photographs as JPEGs in tar shards, for the benchmark of reading them.

What a JPEG costs depends on its bytes a pixel, and these on how sharp it is: no photograph is
enlarged. One that is large enough is scaled down, as img2dataset does; of smaller ones, pieces of
their own pixels are put together.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps
from webdataset import TarWriter

from vqrae_ds.data.shard_writing import find_images

QUALITY = 95  # img2dataset's default
_COLUMNS, _ROWS = 2, 3


def source_jpegs(photos: Path, side: int) -> list[bytes]:
    """Squares of `side` pixels out of the photographs below `photos`.

    First those whose shorter side is large enough, then as many mosaics as there are others.
    Raises `ValueError` where all are smaller than a piece of a mosaic.
    """
    whole, pieces = [], []
    width, height = side // _COLUMNS, -(-side // _ROWS)
    for path in find_images(photos):
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        if min(rgb.size) >= side:
            whole.append(ImageOps.fit(rgb, (side, side), Image.Resampling.BICUBIC))
        elif rgb.width >= width and rgb.height >= height:
            left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
            pieces.append(rgb.crop((left, top, left + width, top + height)))
    if not whole and not pieces:
        raise ValueError(f"{photos} has no photograph of at least {width} x {height} pixels")
    mosaics = [_mosaic(pieces[n:] + pieces[:n], side) for n in range(len(pieces))]
    return [as_jpeg(image) for image in whole + mosaics]


def tiny_jpegs(photos: Path, side: int) -> list[bytes]:
    """All photographs below `photos`, each a small square."""
    found = []
    for path in find_images(photos):
        with Image.open(path) as image:
            found.append(as_jpeg(ImageOps.fit(image.convert("RGB"), (side, side))))
    return found


def as_jpeg(image: Image.Image) -> bytes:
    """As img2dataset stores it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_shard(path: Path, jpegs: Sequence[bytes]) -> None:
    """A tar of samples of three members, as img2dataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for number, jpeg in enumerate(jpegs):
            members = {"jpg": jpeg, "json": b'{"width": 512}', "txt": b"a photograph"}
            writer.write({"__key__": f"{number:09d}", **members})


def _mosaic(pieces: Sequence[Image.Image], side: int) -> Image.Image:
    mosaic, (width, height) = Image.new("RGB", (side, side)), pieces[0].size
    places = itertools.product(range(_ROWS), range(_COLUMNS))
    for (row, column), piece in zip(places, itertools.cycle(pieces), strict=False):
        mosaic.paste(piece, (column * width, row * height))
    return mosaic
