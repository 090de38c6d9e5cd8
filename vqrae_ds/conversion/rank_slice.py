"""The tensors in the files of one tensor rank's data group: where each element of them lies.

Without tensor parallelism that is all of an engine. With it a tensor that the plan divides
(`parallel/slices.py`) is a slice here, and all others are the same for every tensor rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch

from vqrae_ds.conversion.rank_checks import check_addresses, check_stored
from vqrae_ds.conversion.rank_files import Files, Masters, entry, load

Kind = Literal["trainable", "frozen", "buffer"]


class TensorInfo(NamedTuple):
    """Shape and dtype as stored, and the role of a tensor in the module."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind


class Span(NamedTuple):
    """`numel` elements of a mapped tensor from `start` on."""

    tensor: torch.Tensor
    start: int
    numel: int


class RankSlice:
    """`tensors` and, in the order of their elements, `spans` by name; `aliases` are left out.

    Raises `ValueError` as `ZeroCheckpoint` does.
    """

    def __init__(self, folder: Path, files: Files, masters: list[Masters]) -> None:
        self.folder, self.files = folder, files
        self.tensors: dict[str, TensorInfo] = {}
        self.spans: dict[str, list[Span]] = {}
        state = load(files.models[0])
        module = entry(state, "module", dict, files.models[0])
        for name in entry(state, "buffer_names", list, files.models[0]):
            self._add_whole(name, "buffer", entry(module, name, torch.Tensor, files.models[0]))
        shared = entry(state, "shared_params", dict, files.models[0])
        self.groups = entry(state, "param_shapes", list, files.models[0])
        self._add_trained(masters)
        if files.partitioned:
            self._add_frozen_shares(files.models)
        else:
            self._add_frozen_whole(module, shared)

    def beside(self, vectors: list[Masters]) -> RankSlice:
        """The same with other vectors of each rank in the place of its masters."""
        other = copy.copy(self)
        other.tensors, other.spans = {**self.tensors}, {**self.spans}
        other._add_trained(vectors)
        return other

    def _add(self, name: str, shape: Sequence[int], kind: Kind, spans: list[Span]) -> None:
        for span in spans:
            check_stored(name, span.tensor, self.folder)
        found = sum(span.numel for span in spans)
        if found != math.prod(shape):
            raise ValueError(
                f"{self.folder}: {name} is {tuple(shape)}, its ranks hold {found} elements"
            )
        dtypes = {span.tensor.dtype for span in spans}
        if len(dtypes) != 1:
            raise ValueError(f"{self.folder}: the ranks hold {name} in different dtypes {dtypes}")
        self.tensors[name] = TensorInfo(tuple(shape), dtypes.pop(), kind)
        self.spans[name] = spans

    def _add_whole(self, name: str, kind: Kind, tensor: torch.Tensor) -> None:
        self._add(name, tensor.shape, kind, [Span(tensor, 0, tensor.numel())])

    def _add_trained(self, masters: list[Masters]) -> None:
        """What lies in the ranks' flat vectors; each group has shapes by name, in their order."""
        files = self.files.optimizers
        for rank, file in zip(masters, files, strict=True):
            if len(rank.flats) != len(self.groups):
                raise ValueError(
                    f"{file} holds {len(rank.flats)} groups, the model {len(self.groups)}"
                )
        for group, members in enumerate(self.groups):
            if self.files.partitioned:
                flats = [rank.flats[group] for rank in masters]
                self._add_trained_shares(members, flats, files)
                continue
            for name, shape in members.items():
                spans = [
                    Span(rank.flats[group], *rank.addresses[group][name])
                    for rank in masters
                    if name in rank.addresses[group]
                ]
                self._add(name, shape, "trainable", spans)

    def _add_trained_shares(
        self, members: dict[str, Sequence[int]], flats: list[torch.Tensor], files: list[Path]
    ) -> None:
        """ZeRO-3: each rank's vector holds its share of the first member, of the second, ..."""
        start = 0
        for name, shape in members.items():
            self._add(name, shape, "trainable", _shares(flats, start, math.prod(shape)))
            start += _share_numel(shape, len(flats))
        for flat, file in zip(flats, files, strict=True):
            if flat.numel() != start:
                raise ValueError(f"{file} holds a group of {flat.numel()} elements, not {start}")

    def _add_frozen_shares(self, files: list[Path]) -> None:
        """ZeRO-3: one fragment per rank and frozen parameter; the ranks must agree on the model.

        Where DeepSpeed was told to leave them out it wrote None for both.
        """
        agreed, fragments = None, []
        for file in files:
            state = load(file)
            shapes = entry(state, "frozen_param_shapes", (dict, NoneType), file) or {}
            step = entry(state, "global_steps", int, file)
            claim = (entry(state, "param_shapes", list, file), shapes, step)
            agreed = agreed or claim
            if claim != agreed:
                raise ValueError(f"{file} belongs to another model or step than {files[0].name}")
            fragments.append(entry(state, "frozen_param_fragments", (dict, NoneType), file) or {})
            for name, shape in shapes.items():
                fragment = fragments[-1].get(name)
                found = fragment.numel() if isinstance(fragment, torch.Tensor) else 0
                share = _share_numel(shape, len(files))
                if found != share:
                    raise ValueError(f"{file} holds {found} elements of {name}, not {share}")
        for name, shape in agreed[1].items():
            parts = [rank[name] for rank in fragments]
            self._add(name, shape, "frozen", _shares(parts, 0, math.prod(shape)))

    def _add_frozen_whole(self, module: dict[str, Any], shared: dict[str, str]) -> None:
        """ZeRO-1 and 2: what is left in the module after buffers, trained and shared parameters."""
        known = self.tensors.keys() | shared.keys()
        for name, tensor in module.items():
            if name not in known and isinstance(tensor, torch.Tensor):
                self._add_whole(name, "frozen", tensor)


def check_all_addresses(masters: list[Masters], files: Files) -> None:
    """`check_addresses` of each tensor rank's data group: a vector goes on within one of them."""
    for rank in range(files.tensor_size):
        check_addresses(masters[rank :: files.tensor_size], files.of_tensor_rank(rank).optimizers)


def _share_numel(shape: Sequence[int], world_size: int) -> int:
    return -(-math.prod(shape) // world_size)


def _shares(tensors: list[torch.Tensor], start: int, numel: int) -> list[Span]:
    """Equal shares of a tensor of `numel` elements, one a rank, cut where the padding begins."""
    share = _share_numel([numel], len(tensors))
    left = (numel - rank * share for rank in range(len(tensors)))
    return [Span(t, start, min(max(n, 0), share)) for t, n in zip(tensors, left, strict=True)]
