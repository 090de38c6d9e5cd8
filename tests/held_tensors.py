"""How many bytes of tensors a process holds that it did not hold before."""

from __future__ import annotations

import gc
import time

import torch


def settled_bytes(before: dict[int, int]) -> int:
    """Of the storages that were not there before: the least of several looks.

    A thread may hold what it has reduced for a moment after the step that waited for it.
    """
    looks = []
    for _ in range(5):
        time.sleep(0.05)
        after = storages(tensors())
        looks.append(sum(size for address, size in after.items() if address not in before))
    return min(looks)


def tensors() -> list[torch.Tensor]:
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return found + [t.grad for t in found if t.is_leaf and t.grad is not None]


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
