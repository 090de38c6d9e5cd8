"""Read the weights of one engine out of DeepSpeed's checkpoint files, a tensor at a time.

ZeRO-3 cuts every tensor into one share per rank, the last ones padded: a frozen parameter is a
fragment in each `*_model_states.pt`, a trained one a stretch of a flat fp32 vector in each
`*_optim_states.pt`. ZeRO-1 and 2 keep the whole module in one `mp_rank_00_model_states.pt`, and lay
the fp32 masters of a parameter group end to end in one vector that is cut at the ranks' borders.

Beside DeepSpeed's files may lie two kinds of the trainer's own: a moving average of each rank's
masters in the step folder, in the layout of the masters, and frozen weights, whole, in safetensors.
Then DeepSpeed's files have none. All files are mapped, not loaded.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch

from vqrae_ds.conversion.rank_checks import check_addresses, check_same_step, check_stored
from vqrae_ds.conversion.rank_files import (
    Masters,
    entry,
    find_files,
    find_frozen_files,
    load,
    load_safetensors,
    read_averages,
    read_masters,
)

Kind = Literal["trainable", "frozen", "buffer"]


class TensorInfo(NamedTuple):
    """Shape and dtype as stored, and the role of a tensor in the module."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind


class ZeroCheckpoint:
    """The tensors in one engine's checkpoint folder; any world size, ZeRO stage 1, 2 or 3.

    `tensors` maps a name to its `TensorInfo`: fp32 masters of the trained parameters, frozen
    parameters in the dtype they were trained beside, and the persistent buffers of rank 0.
    A parameter that is shared under several names appears under each of them; `aliases` maps the
    further ones to the first. With `averages` the moving averages in the step folder above take the
    place of the masters. `files` are the ranks' files, `step` is the number of steps that the
    engine had made, `deepspeed_version` wrote it.

    Every element of a tensor is read once, and in order: under ZeRO-3 the shares follow each other
    without a gap to the end of each rank's vector, below it `check_addresses` says so.

    Raises `ValueError`, naming the file, when a rank's file is missing or one too many, when the
    ranks contradict each other, and when a file is damaged or holds anything but plain data.
    """

    def __init__(self, folder: Path, *, averages: bool = False) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._spans: dict[str, list[_Span]] = {}
        files = find_files(self.folder)
        self.step = check_same_step(files)
        masters = read_masters(files)
        check_addresses(masters, files.optimizers)
        if averages:
            masters = read_averages(self.folder.parent, masters)
        state = load(files.models[0])
        self.deepspeed_version = str(state.get("ds_version", "unknown"))
        module = entry(state, "module", dict, files.models[0])
        for name in entry(state, "buffer_names", list, files.models[0]):
            self._add_whole(name, "buffer", entry(module, name, torch.Tensor, files.models[0]))
        shared = entry(state, "shared_params", dict, files.models[0])
        self.files, self.masters, self.aliases = files, masters, shared
        self._groups = entry(state, "param_shapes", list, files.models[0])
        self._add_trained(masters)
        if files.partitioned:
            self._add_frozen_shares(files.models)
        else:
            self._add_frozen_whole(module, shared)
        for path in find_frozen_files(self.folder):
            self._add_frozen_file(path)
        self._add_aliases()

    def beside(self, vectors: list[Masters]) -> ZeroCheckpoint:
        """The same checkpoint with other vectors of each rank in the place of its masters.

        They are laid out like them, whatever their dtype: averages, what an optimizer keeps.
        Raises `ValueError`, naming the file of the masters, where one is too short or too long.
        """
        other = copy.copy(self)
        other.masters, other.tensors, other._spans = vectors, {**self.tensors}, {**self._spans}
        other._add_trained(vectors)
        other._add_aliases()
        return other

    def averages(self) -> ZeroCheckpoint:
        """The same with the moving averages. Raises `ValueError` as `read_averages` does."""
        return self.beside(read_averages(self.folder.parent, self.masters))

    def groups(self) -> list[list[str]]:
        """Names of the trained parameters by group (ZeRO-3: sub-group), a vector of a rank each."""
        return [list(members) for members in self._groups]

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The elements of `name` in order, as flat views of the mapped files, without padding."""
        for span in self._spans[name]:
            if span.numel:
                yield span.tensor.reshape(-1)[span.start : span.start + span.numel]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        info = self.tensors[name]
        return torch.cat([torch.empty(0, dtype=info.dtype), *self.pieces(name)]).view(info.shape)

    def read_range(self, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements `start` to `start + numel` of the flat tensor; fewer where it ends before."""
        none = torch.empty(0, dtype=self.tensors[name].dtype)
        return torch.cat([none, *self.range_pieces(name, start, numel)])

    def range_pieces(self, name: str, start: int, numel: int) -> Iterator[torch.Tensor]:
        """What `read_range` gives, in order, as flat views of the mapped files."""
        position = 0
        for span in self._spans[name]:
            first = max(start - position, 0)
            last = min(start + numel - position, span.numel)
            if first < last:
                yield span.tensor.reshape(-1)[span.start + first : span.start + last]
            position += span.numel

    @property
    def num_ranks(self) -> int:
        """How many data-parallel ranks wrote it."""
        return len(self.files.optimizers)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.tensors[name].shape

    def file_of(self, name: str) -> Path:
        """Where one tensor lies, to name it in a message: most are spread over the folder."""
        return self.folder

    def _add(self, name: str, shape: Sequence[int], kind: Kind, spans: list[_Span]) -> None:
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
        self._spans[name] = spans

    def _add_whole(self, name: str, kind: Kind, tensor: torch.Tensor) -> None:
        self._add(name, tensor.shape, kind, [_Span(tensor, 0, tensor.numel())])

    def _add_trained(self, masters: list[Masters]) -> None:
        """What lies in the ranks' flat vectors; each group has shapes by name, in their order."""
        groups, files = self._groups, self.files.optimizers
        for rank, file in zip(masters, files, strict=True):
            if len(rank.flats) != len(groups):
                raise ValueError(f"{file} holds {len(rank.flats)} groups, the model {len(groups)}")
        for group, members in enumerate(groups):
            if self.files.partitioned:
                flats = [rank.flats[group] for rank in masters]
                self._add_trained_shares(members, flats, files)
                continue
            for name, shape in members.items():
                spans = [
                    _Span(rank.flats[group], *rank.addresses[group][name])
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

    def _add_aliases(self) -> None:
        for alias, name in self.aliases.items():
            self.tensors[alias], self._spans[alias] = self.tensors[name], self._spans[name]

    def _add_frozen_file(self, path: Path) -> None:
        for name, tensor in load_safetensors(path).items():
            if name in self.tensors:
                raise ValueError(f"{path} holds {name}, and so do other files of {self.folder}")
            self._add_whole(name, "frozen", tensor)


class _Span(NamedTuple):
    """`numel` elements of a mapped tensor from `start` on."""

    tensor: torch.Tensor
    start: int
    numel: int


def _share_numel(shape: Sequence[int], world_size: int) -> int:
    return -(-math.prod(shape) // world_size)


def _shares(tensors: list[torch.Tensor], start: int, numel: int) -> list[_Span]:
    """Equal shares of a tensor of `numel` elements, one a rank, cut where the padding begins."""
    share = _share_numel([numel], len(tensors))
    left = (numel - rank * share for rank in range(len(tensors)))
    return [_Span(t, start, min(max(n, 0), share)) for t, n in zip(tensors, left, strict=True)]
