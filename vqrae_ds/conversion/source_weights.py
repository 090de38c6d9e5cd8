"""Read pretrained weights as they are published: safetensors or `.bin`, one file or shards.

Files are mapped, not loaded, and one is open at a time. Code in a pickle is never run.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqrae_ds.models.weights import INDEX_FILE, SINGLE_FILE, weight_files

# One file and the index of shards, in order of preference.
_LAYOUTS = (
    (SINGLE_FILE, INDEX_FILE),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class StoredTensor(NamedTuple):
    """Which file holds a tensor, and what it is like."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class SourceWeights:
    """The tensors of a folder, in the order of its files: `tensors` says what is there.

    Raises `ValueError` where there are no weights, where a file is absent, damaged, or holds
    anything but tensors, and where an index points out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self._path: Path | None = None
        self._opened: dict[str, Tensor] = {}
        for path in _find_files(self.folder):
            for name, tensor in self._open(path).items():
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise ValueError(f"{self.folder}: {name} is in {other} and in {path.name}")
                self.tensors[name] = StoredTensor(path, tuple(tensor.shape), tensor.dtype)

    def read(self, name: str) -> Tensor:
        """One tensor. Fast for those of one file after the other: each change of file opens one."""
        return self._open(self.tensors[name].file)[name].detach()

    def _open(self, path: Path) -> dict[str, Tensor]:
        if path != self._path:
            # The last file goes first: one that cannot be mapped lies in memory as a whole.
            self._path, self._opened = None, {}
            self._opened = _load(path)
            self._path = path
        return self._opened


def download(name: str) -> Path:
    """Fetch weights and `config.json` of a model on the Hugging Face hub, or find them cached.

    Takes `.bin` files only where there is no safetensors. Raises `ValueError` where the hub cannot
    be reached or does not give the model.
    """
    from huggingface_hub import snapshot_download

    try:
        for patterns in (["*.json", "model*.safetensors"], ["*.json", "pytorch_model*.bin"]):
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if any(folder.glob(patterns[1])):
                break
    except (OSError, ValueError) as error:  # those of huggingface_hub are subclasses
        raise ValueError(
            f"{name} cannot be downloaded from the Hugging Face hub: {error} "
            "A copy of its folder that is made elsewhere can be given as SOURCE."
        ) from error
    return folder


def _find_files(folder: Path) -> list[Path]:
    for single, index in _LAYOUTS:
        if paths := weight_files(folder, single, index):
            return paths
    names = ", ".join(name for layout in _LAYOUTS for name in layout)
    raise ValueError(f"{folder} holds no weights: none of {names}")


def _load(path: Path) -> dict[str, Tensor]:
    """All tensors of one file; of a mapped one only what is used is read from the disk."""
    return _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read; download it again: {error}") from error


def _load_pickle(path: Path) -> dict[str, Tensor]:
    # Files of PyTorch before 1.6 are no zip archives, and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a pickle is a program: a damaged one fails in any way
        # Without torch's own text, which advises to run what is in the file.
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}); nothing in "
            "it was run. Download it again, or the same model in safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} does not hold tensors by their names, and nothing else")
    return tensors
