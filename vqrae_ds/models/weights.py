"""Folders of safetensors weights in the Hugging Face layout: one file, or shards with an index. No pickle."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class WeightFolder:
    """Reads one tensor at a time, so that a 6B model needs the memory of its largest tensor."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if (self.folder / INDEX_FILE).is_file():
            self._file_of = json.loads((self.folder / INDEX_FILE).read_text())["weight_map"]
            files = sorted(set(self._file_of.values()))
        elif (self.folder / SINGLE_FILE).is_file():
            self._file_of, files = {}, [SINGLE_FILE]
        else:
            raise ValueError(f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        try:
            self._handles = {f: safe_open(self.folder / f, framework="pt") for f in files}
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{self.folder} cannot be read: {error}") from error
        if not self._file_of:
            self._file_of = dict.fromkeys(self._handles[SINGLE_FILE].keys(), SINGLE_FILE)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return tuple(self._handles[self._file_of[name]].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._handles[self._file_of[name]].get_tensor(name)


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
