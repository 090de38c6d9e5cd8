"""The samples of one shard in a few bytes each, and back.

Keys are joined and offsets are kept as the gaps between images, in blocks of the tar; bytes of the
same weight stand together, where zlib finds that most of them repeat. A shard of img2dataset takes
five or six bytes a sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vqrae_ds.data.tar_members import BLOCK

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_LENGTH = (1 << 32) - 1  # bytes of an image
_MAX_KEY_BYTES = 1 << 16
_SEPARATOR = "\0"  # no name in a tar holds one
_LEVEL = 6


class ShardSamples(NamedTuple):
    """The n images of a shard in file order, as columns."""

    keys: list[str]  # without the extension
    extensions: np.ndarray  # (n,) uint8: positions in IMAGE_EXTENSIONS
    offsets: np.ndarray  # (n,) int64, of an image's first byte
    lengths: np.ndarray  # (n,) int64, bytes


def encode_samples(
    keys: Sequence[str],
    extensions: Sequence[str],
    offsets: Sequence[int],
    lengths: Sequence[int],
) -> bytes:
    """The table of a shard, whose images follow one another.

    Raises `ValueError` where no tar has them so: offsets are multiples of its block, for example.
    """
    offsets_n, lengths_n = np.array(offsets, np.int64), np.array(lengths, np.int64)
    gaps_n = np.diff(_in_blocks(offsets_n), prepend=0)
    gaps_n[1:] -= _in_blocks(lengths_n)[:-1]
    if (gaps_n < 0).any() or (lengths_n < 0).any() or (offsets_n % BLOCK).any():
        raise ValueError("samples that do not follow one another in a tar")
    if (lengths_n > MAX_LENGTH).any() or any(_SEPARATOR in key for key in keys):
        raise ValueError(f"a sample of more than {MAX_LENGTH} bytes, or with a zero in its key")
    codes_n = bytes(IMAGE_EXTENSIONS.index(extension) for extension in extensions)
    columns = codes_n + _by_weight(gaps_n, np.uint64) + _by_weight(lengths_n, np.uint32)
    return zlib.compress(columns + _SEPARATOR.join(keys).encode(), _LEVEL)


def decode_samples(table: bytes, num_samples: int) -> ShardSamples:
    """What `encode_samples` was given. Raises `ValueError` where it is no such table."""
    most_bytes = num_samples * (13 + _MAX_KEY_BYTES)
    try:
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(table, most_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"a table of samples is damaged: {error}") from error
    n = num_samples
    keys = data[13 * n :].decode().split(_SEPARATOR) if n else []
    if len(data) < 13 * n or not unpacking.eof or len(keys) != n:
        raise ValueError(f"a table does not have the {n} samples that it should have")
    gaps_n = _from_weights(data[n : 9 * n], np.uint64).astype(np.int64)
    lengths_n = _from_weights(data[9 * n : 13 * n], np.uint32).astype(np.int64)
    gaps_n[1:] += _in_blocks(lengths_n)[:-1]
    codes_n = np.frombuffer(data[:n], np.uint8)
    if (codes_n >= len(IMAGE_EXTENSIONS)).any():
        raise ValueError("a table of samples has an extension that is not known")
    return ShardSamples(keys, codes_n, np.cumsum(gaps_n) * BLOCK, lengths_n)


def _in_blocks(sizes_n: np.ndarray) -> np.ndarray:
    """Sizes in blocks of a tar, rounded up."""
    return -(-sizes_n // BLOCK)


def _by_weight(numbers_n: np.ndarray, dtype: type) -> bytes:
    """All lowest bytes, then all second ones, ..."""
    little_endian_n = numbers_n.astype(np.dtype(dtype).newbyteorder("<"))
    width = little_endian_n.itemsize
    return little_endian_n.view(np.uint8).reshape(len(numbers_n), width).T.tobytes()


def _from_weights(data: bytes, dtype: type) -> np.ndarray:
    width = np.dtype(dtype).itemsize
    bytes_n = np.frombuffer(data, np.uint8).reshape(width, len(data) // width).T
    return np.ascontiguousarray(bytes_n).view(np.dtype(dtype).newbyteorder("<"))[:, 0]
