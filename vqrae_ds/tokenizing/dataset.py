"""Codes for an autoregressive model: sequences of int64, memory-mapped, in a resumable order.

    codes = CodeDataset("codes/train")
    for batch_BN in code_batches(codes, batch_size=64, rank=0, world_size=1, seed=0, start=0):
        loss = gpt(batch_BN)          # (64, h*w) int64, row by row of the grid

Suffixes: B images, N = h*w codes of one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqrae_ds.data.order import SampleOrder, micro_batch_positions
from vqrae_ds.tokenizing.code_shard import map_codes, read_columns
from vqrae_ds.tokenizing.folder import listed_header, read_manifest

_MAPPED_FILES = 64  # a process reads from one at a time, or two where it changes


class CodeDataset(Dataset):
    """A finished folder of tools/tokenize_shards.py: item i is (h*w,) int64, row by row.

    Images are numbered through all files; `num_codes` is the size of the vocabulary, and
    `samples_per_shard` what the order of `code_batches` is made of. Nothing is read but the
    manifest until an item is asked for. Raises `ValueError` where the folder is not finished, or a
    file is not the one that was.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.grid: tuple[int, int] = tuple(manifest["job"]["grid"])
        self.num_codes: int = manifest["job"]["num_codes"]
        self._entries = manifest["shards"]
        self.samples_per_shard = np.array([e["num_samples"] for e in manifest["shards"]], np.int64)
        self._starts = np.cumsum([0, *self.samples_per_shard])
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Tensor:
        shard, place = self._place(number)
        return torch.from_numpy(self._codes(shard)[place].astype(np.int64)).flatten()

    def key(self, number: int) -> str:
        """The key that the image had in its shard; reads those of a whole file."""
        shard, place = self._place(number)
        return read_columns(listed_header(self.folder, self._entries[shard])).keys[place]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_mapped": OrderedDict()}  # each loader process maps its own

    def _place(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"image {number} of {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    def _codes(self, shard: int) -> np.ndarray:
        if shard not in self._mapped:
            self._mapped[shard] = map_codes(listed_header(self.folder, self._entries[shard]))
            if len(self._mapped) > _MAPPED_FILES:
                self._mapped.popitem(last=False)
        return self._mapped[shard]


def code_batches(
    codes: CodeDataset,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    start: int,
    num_workers: int = 0,
) -> Iterator[Tensor]:
    """Endless batches (B, N) int64 of one rank: every image once an epoch, over all ranks.

    The order is a pure function of seed, epoch and the folder, as that of the images in a training
    (`data.order`). `start` is the number of images that all ranks together have consumed: to resume
    is to pass it, with any number of ranks.
    """
    assert batch_size > 0 and 0 <= rank < world_size and start >= 0
    loader = DataLoader(
        _Ordered(codes, seed),
        batch_sampler=micro_batch_positions(
            micro_batch_size=batch_size, rank=rank, world_size=world_size, start=start
        ),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # a resumed run must not draw from the model's
    )
    return iter(loader)


class _Ordered(Dataset):
    """The images by their position in the stream."""

    def __init__(self, codes: CodeDataset, seed: int) -> None:
        self.codes, self.order = codes, SampleOrder(codes.samples_per_shard, seed=seed)

    def __getitem__(self, position: int) -> Tensor:
        return self.codes[self.order.sample_at(position).sample]
