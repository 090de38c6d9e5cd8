"""Folders of safetensors weights in the Hugging Face layout: one file, or shards with an index.

No pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqrae_ds.config.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by their names at a command line


def weight_files(
    folder: str | Path, single: str = SINGLE_FILE, index: str = INDEX_FILE
) -> list[Path]:
    """The files of one layout in `folder`: `single`, the shards that `index` names, or none.

    Raises `ValueError` where both are there, and for an index that is damaged or incomplete.
    """
    single_path, index_path = Path(folder) / single, Path(folder) / index
    if single_path.is_file() and index_path.is_file():
        raise ValueError(f"{single_path} and {index} are both there: remove the outdated one")
    if index_path.is_file():
        return _shards(index_path)
    return [single_path] if single_path.is_file() else []


class StoredWeights(Protocol):
    """Tensors by name that are read one at a time; `folder` is where they lie."""

    folder: Path

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def file_of(self, name: str) -> Path: ...

    def read(self, name: str) -> Tensor: ...

    def read_range(self, name: str, start: int, numel: int) -> Tensor: ...


class WeightFolder:
    """Reads one tensor at a time, so that a 6B model needs the memory of its largest tensor.

    Raises `ValueError` where the folder holds no weights, both layouts, or a file that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        paths = weight_files(folder)
        if not paths:
            raise ValueError(f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        self._handle_of: dict[str, safe_open] = {}
        self._file_of: dict[str, Path] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            self._handle_of |= dict.fromkeys(handle.keys(), handle)
            self._file_of |= dict.fromkeys(handle.keys(), path)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._handle_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header. Raises `ValueError` where there is none."""
        return tuple(self._find(name).get_slice(name).get_shape())

    def file_of(self, name: str) -> Path:
        """The file that holds one tensor, to name it in a message."""
        return self._file_of[name]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises `ValueError` where there is none."""
        return self._find(name).get_tensor(name)

    def read_range(self, name: str, start: int, numel: int) -> Tensor:
        """Elements `start` to `start + numel` of the flat tensor; fewer where it ends before."""
        return self.read(name).flatten()[start : start + numel]

    def _find(self, name: str) -> safe_open:
        if name not in self._handle_of:
            raise ValueError(f"{self.folder} holds no tensor {name}")
        return self._handle_of[name]


def check_names(expected: set[str], found: set[str], source: object) -> None:
    """Raise `ValueError` naming tensors that are missing from, or foreign to, `source`."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        parts = [
            f"{label} {', '.join(n[:4])}{' ...' if len(n) > 4 else ''} ({len(n)})"
            for label, n in (("missing", missing), ("unexpected", extra))
            if n
        ]
        raise ValueError(f"the tensors of {source} do not fit the model: {'; '.join(parts)}")


def check_shape(weights: StoredWeights, name: str, expected: tuple[int, ...]) -> None:
    """Raise `ValueError` where a stored tensor has another shape than the model's."""
    found = weights.shape(name)
    if found != expected:
        raise ValueError(f"{name} in {weights.folder} has shape {found}, the model {expected}")


@torch.no_grad()
def copy_weights(
    model: nn.Module,
    weights: WeightFolder,
    leaves_out: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copy every tensor of `weights` into `model`, whose dtypes stay.

    `leaves_out` says which tensors the model has no use for. Raises `ValueError`, before anything
    is copied, on a missing, extra or misshaped tensor.
    """
    targets = model.state_dict()
    found = {name for name in weights.names() if not leaves_out(name)}
    check_names(set(targets), found, weights.folder)
    for name, target in targets.items():
        check_shape(weights, name, tuple(target.shape))
    for name, target in targets.items():
        target.copy_(weights.read(name))


def set_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype`; buffers, statistics among them, stay as they are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def is_finite(tensor: Tensor) -> bool:
    """Whether all of `tensor` is finite, found without a mask of its size."""
    return tensor.numel() == 0 or all(x.isfinite().item() for x in torch.aminmax(tensor))


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Which tensor lies where is read from the files themselves.

    Raises `ValueError` for what is no index, and for a file that is absent or not beside it.
    """
    weight_map = read_json(index, "the index of the weights").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: it is not an index of weight files")
    paths = []
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}: only files beside it are read")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there: download or copy it")
        paths.append(index.parent / name)
    return paths
