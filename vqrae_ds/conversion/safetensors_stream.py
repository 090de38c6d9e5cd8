"""Write safetensors files piece by piece: the header first, then the bytes, never a whole tensor.

Large sets are split in Hugging Face's layout: `model-00001-of-000NN.safetensors` files and a
`model.safetensors.index.json`. `compare` reads back through the safetensors library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from vqrae_ds.manifest import FileRecord, hash_file, write_json_atomically

_CHUNK_ELEMENTS = 1 << 20
_DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class StreamedTensor(NamedTuple):
    """A tensor to write; `pieces()` gives its elements in order, flat, and in any dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[torch.Tensor]:
        """The bytes in order, as flat uint8 tensors of a few MB, each valid until the next."""
        # One buffer for all casts: malloc does not reliably give a freed one out again.
        buffer = torch.empty(_CHUNK_ELEMENTS, dtype=self.dtype)
        for piece in self.pieces():
            for chunk in piece.split(_CHUNK_ELEMENTS):
                if chunk.dtype != self.dtype:
                    chunk = buffer[: chunk.numel()].copy_(chunk)
                yield chunk.view(torch.uint8)


def in_file_order(tensors: list[StreamedTensor]) -> list[StreamedTensor]:
    """The order of the tensors in a file, in which their pieces are asked for.

    Wide types first: readers view the mapped bytes in place, and torch wants every tensor aligned
    to its element.
    """
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def write_file(
    path: Path, tensors: list[StreamedTensor], advance: Callable[[int], object]
) -> FileRecord:
    """Write and sync `tensors` to one file; `advance` is told the bytes of each chunk written.

    The digest that it returns is of what was to be written, not of what a disk made of it.
    """
    header = _header(tensors)
    digest = xxhash.xxh3_128(header)
    with open(path, "wb") as file:
        file.write(header)
        for chunk in _chunks(tensors):
            content = chunk.numpy()
            file.write(content)
            digest.update(content)
            advance(len(content))
        size = file.tell()
        end = len(header) + sum(tensor.num_bytes for tensor in tensors)
        assert size == end, "the pieces do not add up to the tensors"
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def record_of(tensors: list[StreamedTensor]) -> FileRecord:
    """Size and digest of the file that `write_file` would write."""
    header = _header(tensors)
    digest, size = xxhash.xxh3_128(header), len(header)
    for chunk in _chunks(tensors):
        digest.update(chunk.numpy())
        size += chunk.numel()
    return FileRecord(size, digest.hexdigest())


def write_model(
    folder: Path,
    tensors: list[StreamedTensor],
    max_shard_bytes: int,
    advance: Callable[[int], object],
) -> dict[str, FileRecord]:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` and their index.

    A single tensor that is larger gets a file of its own. Returns what was written, by its name.
    """
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": write_file(folder / "model.safetensors", tensors, advance)}
    files, weight_map = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = write_file(folder / name, shard, advance)
        weight_map.update({tensor.name: name for tensor in shard})
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path = folder / "model.safetensors.index.json"
    write_json_atomically(path, index)
    return files | {path.name: hash_file(path)}


def compare(
    folder: Path, stem: str, tensors: list[StreamedTensor], advance: Callable[[int], object]
) -> list[str]:
    """Compare `STEM*.safetensors` with `tensors`, bit for bit; a line per difference.

    A tensor that is absent, there twice, unexpected or misplaced by the index is a difference too.
    """
    expected = {tensor.name: tensor for tensor in tensors}
    differences, seen = [], {}
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a handle, not a dict
                    if name in seen:
                        differences.append(f"{name} is in {seen[name]} and again in {path.name}")
                    elif name not in expected:
                        differences.append(f"{name} in {path.name} is not in the checkpoint")
                    elif difference := _difference(expected[name], file.get_tensor(name), advance):
                        differences.append(f"{name} in {path.name} {difference}")
                    seen[name] = path.name
        except SafetensorError as error:
            differences.append(f"{path.name} cannot be read: {error}")
    index = folder / f"{stem}.safetensors.index.json"
    single = dict.fromkeys(seen, f"{stem}.safetensors")
    if seen != (json.loads(index.read_text())["weight_map"] if index.exists() else single):
        differences.append(f"{index.name} does not say which file holds what")
    return differences + [f"{name} was not written" for name in expected if name not in seen]


def _header(tensors: list[StreamedTensor]) -> bytes:
    """The length of the header and the header, of whole words together."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in in_file_order(tensors):
        start, end = end, end + tensor.num_bytes
        code = _DTYPE_CODES[tensor.dtype]
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _chunks(tensors: list[StreamedTensor]) -> Iterator[torch.Tensor]:
    for tensor in in_file_order(tensors):
        yield from tensor.chunks()


def _split(tensors: list[StreamedTensor], max_shard_bytes: int) -> list[list[StreamedTensor]]:
    """Consecutive tensors in shards of at most `max_shard_bytes`; one empty shard for none."""
    shards: list[list[StreamedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _difference(
    tensor: StreamedTensor, stored: torch.Tensor, advance: Callable[[int], object]
) -> str | None:
    if tuple(stored.shape) != tensor.shape or stored.dtype != tensor.dtype:
        found = f"{stored.dtype} {tuple(stored.shape)}"
        return f"is {found}, the checkpoint says {tensor.dtype} {tensor.shape}"
    stored_bytes, position = stored.reshape(-1).view(torch.uint8), 0
    for chunk in tensor.chunks():
        if not torch.equal(chunk, stored_bytes[position : position + chunk.numel()]):
            return "differs from the checkpoint"
        position += chunk.numel()
        advance(chunk.numel())
    if position != stored_bytes.numel():
        return f"holds {stored_bytes.numel()} bytes, the checkpoint {position}"
    return None
