"""Read the weights of one engine out of DeepSpeed's checkpoint files, a tensor at a time.

ZeRO-3 cuts every tensor into one share per rank, the last ones padded: a frozen parameter is a
fragment in each `*_model_states.pt`, a trained one a stretch of a flat fp32 vector in each
`*_optim_states.pt`. ZeRO-1 and 2 keep the whole module in one `mp_rank_00_model_states.pt`, and lay
the fp32 masters of a parameter group end to end in one vector that is cut at the ranks' borders.

The files are mapped, not loaded. They are pickles: tensors and plain containers are all that is
ever built from them, and DeepSpeed itself is not imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

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
    A parameter that is shared under several names appears under each of them.

    Raises `ValueError`, naming the file, when a rank's file is missing or one too many, when the
    ranks contradict each other, and when a file is damaged or holds anything but plain data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._spans: dict[str, list[_Span]] = {}
        files = _find_files(self.folder)
        masters = [_read_masters(file, files) for file in files.optimizers]
        state = _load(files.models[0])
        module = _entry(state, "module", dict, files.models[0])
        for name in _entry(state, "buffer_names", list, files.models[0]):
            self._add_whole(name, "buffer", module[name])
        shared = _entry(state, "shared_params", dict, files.models[0])
        self._add_trained(_entry(state, "param_shapes", list, files.models[0]), masters, files)
        if files.partitioned:
            self._add_frozen_shares(files.models)
        else:
            self._add_frozen_whole(module, shared)
        for alias, name in shared.items():
            self.tensors[alias], self._spans[alias] = self.tensors[name], self._spans[name]

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The elements of `name` in order, as flat views of the mapped files, without padding."""
        for span in self._spans[name]:
            if span.numel:
                yield span.tensor.reshape(-1)[span.start : span.start + span.numel]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        info = self.tensors[name]
        return torch.cat([torch.empty(0, dtype=info.dtype), *self.pieces(name)]).view(info.shape)

    def _add(self, name: str, shape: Sequence[int], kind: Kind, spans: list[_Span]) -> None:
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

    def _add_trained(
        self, shapes: list[dict[str, Sequence[int]]], masters: list[_Masters], files: _Files
    ) -> None:
        """The fp32 masters; `shapes` has a dict for each parameter group (ZeRO-3: sub-group)."""
        for rank, file in zip(masters, files.optimizers, strict=True):
            if len(rank.flats) != len(shapes):
                raise ValueError(f"{file} holds {len(rank.flats)} groups, the model {len(shapes)}")
        for group, members in enumerate(shapes):
            if files.partitioned:
                flats = [rank.flats[group] for rank in masters]
                self._add_trained_shares(members, flats, files.optimizers)
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
        """ZeRO-3: one fragment per rank and frozen parameter; the ranks must agree on the model."""
        agreed, fragments = None, []
        for file in files:
            state = _load(file)
            shapes = _entry(state, "frozen_param_shapes", dict, file)
            step = _entry(state, "global_steps", int, file)
            claim = (_entry(state, "param_shapes", list, file), shapes, step)
            agreed = agreed or claim
            if claim != agreed:
                raise ValueError(f"{file} belongs to another model or step than {files[0].name}")
            fragments.append(_entry(state, "frozen_param_fragments", dict, file))
            for name, shape in shapes.items():
                found = fragments[-1][name].numel() if name in fragments[-1] else 0
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


class _Span(NamedTuple):
    """`numel` elements of a mapped tensor from `start` on."""

    tensor: torch.Tensor
    start: int
    numel: int


class _Address(NamedTuple):
    """Where one rank's flat vector holds its part of a parameter."""

    start: int
    numel: int


class _Masters(NamedTuple):
    """One rank's flat fp32 vectors, one a group; `addresses` is empty under ZeRO-3."""

    flats: list[torch.Tensor]
    addresses: list[dict[str, _Address]]


class _Files(NamedTuple):
    """An engine's files in the order of the ranks; `partitioned` is ZeRO-3."""

    partitioned: bool
    models: list[Path]
    optimizers: list[Path]


def _share_numel(shape: Sequence[int], world_size: int) -> int:
    return -(-math.prod(shape) // world_size)


def _shares(tensors: list[torch.Tensor], start: int, numel: int) -> list[_Span]:
    """Equal shares of a tensor of `numel` elements, one a rank, cut where the padding begins."""
    share = _share_numel([numel], len(tensors))
    left = (numel - rank * share for rank in range(len(tensors)))
    return [_Span(t, start, min(max(n, 0), share)) for t, n in zip(tensors, left, strict=True)]


def _find_files(folder: Path) -> _Files:
    """The engine's files; a rank too many (another run's?) is refused like a missing one."""
    optimizers = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    if not optimizers:
        raise ValueError(f"{folder} holds no zero_pp_rank_*_optim_states.pt: not a ZeRO checkpoint")
    state = _entry(_load(optimizers[0]), "optimizer_state_dict", dict, optimizers[0])
    world_size = _world_size(state, optimizers[0])
    partitioned = "fp32_flat_groups" in state
    prefix = optimizers[0].name.partition("zero_pp_rank_")[0]
    ranks = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(world_size)]
    models = ranks if partitioned else ["mp_rank_00"]
    files = _Files(
        partitioned,
        [folder / f"{name}_model_states.pt" for name in models],
        [folder / f"{prefix}{name}_optim_states.pt" for name in ranks],
    )
    expected, present = {*files.models, *files.optimizers}, set(folder.glob("*_states.pt"))
    if missing := sorted(str(path) for path in expected - present):
        raise ValueError(f"{', '.join(missing)} missing: the checkpoint is of {world_size} ranks")
    if strange := sorted(str(path) for path in present - expected):
        raise ValueError(
            f"{', '.join(strange)} does not belong to a checkpoint of {world_size} data-parallel "
            "ranks (and a tensor-parallel one cannot be converted)"
        )
    return files


def _read_masters(file: Path, files: _Files) -> _Masters:
    state = _entry(_load(file), "optimizer_state_dict", dict, file)
    if _world_size(state, file) != len(files.optimizers):
        raise ValueError(f"{file} is of another world size than {files.optimizers[0].name}")
    if files.partitioned:
        return _Masters(_entry(state, "fp32_flat_groups", list, file), [])
    flats = _entry(state, "single_partition_of_fp32_groups", list, file)
    mappings = _entry(state, "param_slice_mappings", list, file)
    addresses = [{n: _Address(a.start, a.numel) for n, a in group.items()} for group in mappings]
    for flat, group in zip(flats, addresses, strict=True):
        for name, address in group.items():
            if not 0 <= address.start <= address.start + address.numel <= flat.numel():
                raise ValueError(f"{file} is too short for its part of {name}")
    return _Masters(flats, addresses)


def _world_size(state: dict[str, Any], file: Path) -> int:
    """The number of ranks that share the optimizer state; ZeRO-1 and 2 say it once per group."""
    count = _entry(state, "partition_count", (int, list), file)
    counts = set(count) if isinstance(count, list) else {count}
    if len(counts) != 1:
        raise ValueError(f"{file} has groups over different numbers of ranks: {sorted(counts)}")
    return counts.pop()


def _entry(state: Any, key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    if not isinstance(state, dict) or not isinstance(state.get(key), kind):
        raise ValueError(f"{file} has no usable {key!r}: it is not a file of a ZeRO engine")
    return state[key]


class _Record:
    """Stands in for DeepSpeed's own classes: takes their attributes, runs none of their code."""


_ALLOWED = [
    (_Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Record, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def _load(file: Path) -> Any:
    """Map one file; nothing in it is executed."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what a damaged or hostile file raises has no common base
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{file} wants to load {refused[1]}, which is not data: refused"
            ) from None
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
