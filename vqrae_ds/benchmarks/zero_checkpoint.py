"""A step folder with the ZeRO-3 files of many ranks, made on one machine without any engine.

Layout and keys are those that DeepSpeed 0.19.8 writes (runtime/engine.py, `_save_zero_checkpoint`
and `_save_checkpoint`; runtime/zero/stage3.py, `_rigid_state_dict`). Zeros take no room on the
disk: the files have holes where a write of nothing but zeros would be.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqrae_ds.manifest import Manifest, hash_file, list_files, write_manifest

STEP = 1000


class Shape(NamedTuple):
    """A model of blocks: `num_frozen` of them frozen in bf16, `num_trained` trained in fp32.

    A block has 12 `width`^2 elements in matrices, and vectors of a length that no number of ranks
    above 1 divides.
    """

    width: int
    num_frozen: int
    num_trained: int

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(math.prod(shape) for part in self.parts() for shape in part.values())

    def parts(self) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
        """Names and shapes: first of what is frozen, then of what is trained."""
        return (
            _blocks("vqrae.encoder.layer", self.num_frozen, self.width),
            _blocks("vqrae.decoder.blocks", self.num_trained, self.width),
        )


def _blocks(prefix: str, number: int, width: int) -> dict[str, torch.Size]:
    odd = 2 * 3 * 5 * 7 + 1  # leaves a remainder with every usual number of ranks
    shapes = {
        "attention.qkv.weight": (3 * width, width),
        "attention.proj.weight": (width, width),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc2.weight": (width, 4 * width),
        "scale": (odd,),
    }
    return {
        f"{prefix}.{i}.{name}": torch.Size(shape)
        for i in range(number)
        for name, shape in shapes.items()
    }


def write_checkpoint(folder: Path, shape: Shape, num_ranks: int, *, filled: bool = True) -> None:
    """Write the step folder `folder`, manifest included; rank after rank, in the memory of one.

    Weights are random and the moments of the optimizer zeros. Without `filled` all is zeros.
    """
    generator = folder / "generator"
    generator.mkdir(parents=True)
    frozen, trained = shape.parts()
    random = torch.Generator().manual_seed(0)
    buffers = {"vqrae.standardize.mean": torch.randn(shape.width, generator=random)}
    make = _Values(random if filled else None)
    for rank in range(num_ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        model = {
            "module": OrderedDict(buffers),
            "buffer_names": list(buffers),
            "param_shapes": [OrderedDict(trained)],
            "frozen_param_shapes": OrderedDict(frozen),
            "frozen_param_fragments": OrderedDict(
                (n, make.values(_share(s, num_ranks), torch.bfloat16)) for n, s in frozen.items()
            ),
            "shared_params": {},
            "global_steps": STEP,
            "skipped_steps": 0,
            "ds_version": "0.19.8",
        }
        _save(model, generator / f"{name}_model_states.pt")
        del model
        numel = sum(_share(s, num_ranks) for s in trained.values())
        moments = {"step": torch.tensor(float(STEP))}
        moments |= {key: _zeros(numel, torch.float32) for key in ("exp_avg", "exp_avg_sq")}
        state = {
            "zero_stage": 3,
            "partition_count": num_ranks,
            "fp32_flat_groups": [make.values(numel, torch.float32)],
            "optimizer_state_dict": {"state": {0: moments}, "param_groups": []},
        }
        _save({"optimizer_state_dict": state}, generator / f"{name}_optim_states.pt")
    (folder / "model_config.json").write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"step": STEP, "stage": 1}))
    files = {name: hash_file(folder / name) for name in list_files(folder)}
    write_manifest(folder, Manifest(STEP, 1, num_ranks, {"torch": torch.__version__}, files))


class _Values:
    def __init__(self, random: torch.Generator | None) -> None:
        self.random = random

    def values(self, numel: int, dtype: torch.dtype) -> Tensor:
        if self.random is None:
            return _zeros(numel, dtype)
        # bf16 is drawn as such: a fp32 draw first would need three times the memory.
        return torch.randn(numel, dtype=dtype, generator=self.random)


def _zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written to; those of PyTorch are written at once."""
    return torch.from_numpy(np.zeros(numel * dtype.itemsize, np.uint8)).view(dtype)


def _share(shape: torch.Size, num_ranks: int) -> int:
    return -(-shape.numel() // num_ranks)


class _Holes:
    """A file whose writes of zeros alone become holes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, content: bytes) -> int:
        if len(content) > 1 << 16 and not np.frombuffer(content, np.uint8).any():
            self.file.seek(len(content), 1)
        else:
            self.file.write(content)
        return len(content)

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def _with_holes(path: Path) -> Iterator[_Holes]:
    with open(path, "wb") as file:
        yield _Holes(file)
        file.truncate(file.tell())


def _save(state: dict, path: Path) -> None:
    with _with_holes(path) as file:
        torch.save(state, file)
