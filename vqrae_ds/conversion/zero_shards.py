"""Read the weights of one engine out of DeepSpeed's checkpoint files, a tensor at a time.

ZeRO-3 cuts every tensor into one share per rank, the last ones padded: a frozen parameter is a
fragment in each `*_model_states.pt`, a trained one a stretch of a flat vector of masters in each
`*_optim_states.pt`. ZeRO-1 and 2 keep the whole module in one `mp_rank_00_model_states.pt`, and lay
the masters of a parameter group end to end in one vector that is cut at the ranks' borders.
With tensor parallelism all of that is there once for each tensor rank, of its slices.

Beside DeepSpeed's files may lie two kinds of the trainer's own: a moving average of each rank's
masters in the step folder, in the layout of the masters, and frozen weights, whole, in safetensors.
Then DeepSpeed's files have none. All files are mapped, not loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from vqrae_ds.conversion.merged_spans import MergedSpans, merged_info
from vqrae_ds.conversion.rank_checks import check_same_step, check_stored
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
from vqrae_ds.conversion.rank_slice import RankSlice, Span, TensorInfo, check_all_addresses
from vqrae_ds.parallel.slices import Place, own_slice, split_of

_PIECE_ELEMENTS = 1 << 20


class ZeroCheckpoint:
    """The tensors in one engine's checkpoint folder; any layout, ZeRO stage 1, 2 or 3.

    `tensors` maps a name to its `TensorInfo`: masters of the trained parameters, frozen
    parameters in the dtype they were trained beside, and the persistent buffers of rank 0.
    A parameter that is shared under several names appears under each of them; `aliases` maps the
    further ones to the first. With `averages` the moving averages in the step folder above take the
    place of the masters. `files` are the ranks' files, `step` is the number of steps that the
    engine had made, `deepspeed_version` wrote it.

    Of a tensor that a tensor-parallel group divides the whole is read, unless `sliced` was called.

    Every element of a tensor is read once, and in order: under ZeRO-3 the shares follow each other
    without a gap to the end of each rank's vector, below it `check_addresses` says so.

    Raises `ValueError`, naming the file, when a rank's file is missing or one too many, when the
    ranks contradict each other, and when a file is damaged or holds anything but plain data.
    """

    def __init__(self, folder: Path, *, averages: bool = False) -> None:
        self.folder = Path(folder)
        self.files = files = find_files(self.folder)
        self.step = check_same_step(files)
        masters = read_masters(files)
        check_all_addresses(masters, files)
        self.masters = read_averages(self.folder.parent, masters) if averages else masters
        state = load(files.models[0])
        self.deepspeed_version = str(state.get("ds_version", "unknown"))
        self.aliases = entry(state, "shared_params", dict, files.models[0])
        self._slices = [
            RankSlice(self.folder, files.of_tensor_rank(rank), self._masters_of(rank))
            for rank in range(files.tensor_size)
        ]
        self._frozen = self._read_frozen_files()
        self._slice_of: tuple[ZeroCheckpoint, Place] | None = None
        self._collect()

    def beside(self, vectors: list[Masters]) -> ZeroCheckpoint:
        """The same checkpoint with other vectors of each rank in the place of its masters.

        They are laid out like them, whatever their dtype: averages, what an optimizer keeps.
        Raises `ValueError`, naming the file of the masters, where one is too short or too long.
        """
        other = copy.copy(self)
        other.masters = vectors
        other._slices = [s.beside(other._masters_of(r)) for r, s in enumerate(self._slices)]
        other._collect()
        return other

    def averages(self) -> ZeroCheckpoint:
        """The same with the moving averages. Raises `ValueError` as `read_averages` does."""
        if self._slice_of is not None:  # their files are counted over all ranks
            whole, place = self._slice_of
            return whole.averages().sliced(place)
        return self.beside(read_averages(self.folder.parent, self.masters))

    def sliced(self, place: Place) -> ZeroCheckpoint:
        """What the tensor rank at `place` holds. `place.size` is the number of those that wrote."""
        assert place.size == self.tensor_size
        other = copy.copy(self)
        other._slice_of = (self, place)
        other.files = self.files.of_tensor_rank(place.rank)
        other.masters = self._masters_of(place.rank)
        other._slices = [self._slices[place.rank]]
        other._frozen = {}
        for name, tensor in self._frozen.items():
            split = split_of(name)
            other._frozen[name] = tensor if split is None else own_slice(tensor, split, place)
        other._collect()
        return other

    def groups(self) -> list[list[str]]:
        """Names of the trained parameters by group (ZeRO-3: sub-group), a vector of a rank each."""
        return [list(members) for members in self._slices[0].groups]

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
        return len(self.files.optimizers) // self.tensor_size

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.tensors[name].shape

    def file_of(self, name: str) -> Path:
        """Where one tensor lies, to name it in a message: most are spread over the folder."""
        return self.folder

    @property
    def tensor_size(self) -> int:
        """How many tensor ranks hold slices; 1 for what `sliced` gives."""
        return self.files.tensor_size

    def _masters_of(self, tensor_rank: int) -> list[Masters]:
        return self.masters[tensor_rank :: self.tensor_size]

    def _collect(self) -> None:
        """Names and places of all tensors, from slices and files, those with several names last."""
        self.tensors: dict[str, TensorInfo] = {}
        self._spans: dict[str, Iterable[Span]] = {}
        first = self._slices[0]
        for rank, other in enumerate(self._slices):
            if other.tensors.keys() != first.tensors.keys():
                raise ValueError(f"{self.folder}: tensor rank {rank} holds other tensors than 0")
        for name, info in first.tensors.items():
            split = split_of(name) if self.tensor_size > 1 else None
            self.tensors[name], self._spans[name] = info, first.spans[name]
            for rank, other in enumerate(self._slices if split is None else ()):
                if other.tensors[name] != info:
                    raise ValueError(
                        f"{self.folder}: tensor rank {rank} holds another {name} than 0"
                    )
            if split is not None:
                self.tensors[name] = info = merged_info(name, self._slices, split, self.folder)
                by_rank = [each.spans[name] for each in self._slices]
                self._spans[name] = MergedSpans(by_rank, info.shape, split)
        for name, tensor in self._frozen.items():
            self.tensors[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, "frozen")
            self._spans[name] = [Span(tensor, 0, tensor.numel())]
        for alias, name in self.aliases.items():
            self.tensors[alias], self._spans[alias] = self.tensors[name], self._spans[name]

    def _read_frozen_files(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for path in find_frozen_files(self.folder):
            for name, tensor in load_safetensors(path).items():
                if name in found or name in self._slices[0].tensors:
                    raise ValueError(f"{path} holds {name}, and so do other files of {self.folder}")
                check_stored(name, tensor, self.folder)
                found[name] = tensor
        return found
