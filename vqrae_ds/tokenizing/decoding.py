"""The way back: files of codes -> images, and PNG files of them.

Codes are decoded in batches of the size that they were made in, shard by shard. The images are then
those of `decode_from_indices` on the same batches, bit for bit; with other batches a machine may
add in another order, and their last bits may differ. A PNG has them rounded to 8 bits.
Suffixes: B images of a batch, 3 channels, H x W pixels, h x w grid of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqrae_ds.data.decode import as_bytes
from vqrae_ds.manifest import write_json_atomically
from vqrae_ds.tokenizing.code_shard import is_sound, read_columns
from vqrae_ds.tokenizing.folder import listed_header, read_manifest

Decode = Callable[[Tensor], Tensor]  # codes (B, h, w) int64 -> images (B, 3, H, W) in [0, 1]
KEYS_NAME = "keys.json"


class DecodedBatch(NamedTuple):
    """The images `first` .. `first` + B - 1 of all that the folder has codes of."""

    first: int
    keys: list[str]
    images_B3HW: Tensor


def decoded_batches(
    folder: Path, decode: Decode, *, first: int = 0, end: int | None = None, batch_size: int = 0
) -> Iterator[DecodedBatch]:
    """The batches with any image of `first` .. `end` - 1, in the order of the files.

    By default in batches of the size that the codes of a file were made in. Raises `ValueError`
    where the folder is not finished, or a file of it is damaged, and as `decode` does.
    """
    start = 0
    for entry in read_manifest(folder)["shards"]:
        past = start + entry["num_samples"]
        if past > first and (end is None or start < end):
            header = listed_header(folder, entry)
            if not is_sound(header):
                raise ValueError(f"{header.path} was altered after it was written")
            columns, size = read_columns(header), batch_size or header.made_with["batch_size"]
            for piece in batches_of(columns.numbers_N, size):
                if start + piece.stop <= first or (end is not None and start + piece.start >= end):
                    continue
                codes_Bhw = torch.from_numpy(columns.codes_Nhw[piece].astype(np.int64))
                yield DecodedBatch(start + piece.start, columns.keys[piece], decode(codes_Bhw))
        start = past


def batches_of(numbers_N: np.ndarray, batch_size: int) -> Iterator[slice]:
    """The rows that were encoded together: those of `batch_size` places that follow one another.

    There are fewer rows than places where samples were skipped.
    """
    batches_N = numbers_N // batch_size
    edges = [0, *(np.flatnonzero(np.diff(batches_N)) + 1).tolist(), len(numbers_N)]
    for begin, stop in zip(edges, edges[1:], strict=False):
        if begin < stop:
            yield slice(begin, stop)


def write_images(
    folder: Path, decode: Decode, output: Path, *, first: int, end: int | None, batch_size: int
) -> int:
    """PNG files called by number, and `keys.json`, number -> key. Returns how many.

    Keys are text from elsewhere, and become no path. Raises `ValueError` where `output` is not
    empty, where there is no image `first`, and as `decoded_batches` does.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: name another one, or remove it first")
    total = sum(entry["num_samples"] for entry in read_manifest(folder)["shards"])
    if first >= total:
        raise ValueError(f"--first {first}: {folder} has {total} images, counted from 0")
    output.mkdir(parents=True, exist_ok=True)
    keys: dict[str, str] = {}
    options = {"first": first, "end": end, "batch_size": batch_size}
    for batch in decoded_batches(folder, decode, **options):
        for place, (key, image_3HW) in enumerate(zip(batch.keys, batch.images_B3HW, strict=True)):
            number = batch.first + place
            if first <= number and (end is None or number < end):
                keys[f"{number:09d}"] = key
                Image.fromarray(to_8_bits(image_3HW)).save(output / f"{number:09d}.png")
    write_json_atomically(output / KEYS_NAME, keys)
    return len(keys)


def to_8_bits(image_3HW: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3), rounded to the nearest."""
    return as_bytes(image_3HW).permute(1, 2, 0).cpu().numpy()
