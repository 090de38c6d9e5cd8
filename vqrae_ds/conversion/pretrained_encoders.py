"""A published vision encoder -> the encoder folder that a run starts from.

`config.json` and safetensors, named as the transformers library's class of the family names its
parameters. Values stay as they are; a fused qkv is split by rows. Memory stays at a few MB, or at
one file of the source where that cannot be mapped.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqrae_ds.config.files import read_json
from vqrae_ds.conversion.encoder_layouts import (
    Layout,
    Origin,
    Tower,
    build_tower,
    find_layout,
    find_origin,
)
from vqrae_ds.conversion.output_folder import check_free, new_folder
from vqrae_ds.conversion.progress import progress_bar
from vqrae_ds.conversion.safetensors_stream import StreamedTensor, compare, write_model
from vqrae_ds.conversion.source_weights import SourceWeights
from vqrae_ds.manifest import write_json_atomically
from vqrae_ds.models.weights import check_names, is_finite

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ImportedEncoder(NamedTuple):
    """What has been imported, for a line of text. `dtype` lists several where they are mixed."""

    family: str
    num_blocks: int
    hidden_size: int
    num_parameters: int
    dtype: str


class _Plan(NamedTuple):
    """What is to be written."""

    family: str
    config: dict[str, Any]
    tensors: list[StreamedTensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def import_encoder(
    source: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2 << 30,
    progress: bool = False,
) -> ImportedEncoder:
    """Import the checkpoint folder `source` into the new folder `output`.

    `dtype` is that of the weights, as they are stored by default. `output` appears, complete and
    synced, by a rename at the end. Raises `ValueError`, before anything is written, when `output`
    exists, when `source` is not a known kind of checkpoint or damaged, and when a tensor of the
    encoder is missing, unexpected or of another shape; and in the middle, leaving nothing, for one
    that is not finite.
    """
    source, output = Path(source), Path(output)
    check_free(output)
    plan = _make_plan(source, dtype)
    with new_folder(output) as folder:
        with progress_bar(plan.num_bytes, "writing", progress) as bar:
            write_model(folder, plan.tensors, max_shard_bytes, bar.update)
        write_json_atomically(folder / "config.json", plan.config)
    return ImportedEncoder(
        family=plan.family,
        num_blocks=plan.config["num_hidden_layers"],
        hidden_size=plan.config["hidden_size"],
        num_parameters=sum(math.prod(tensor.shape) for tensor in plan.tensors),
        dtype=" and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in plan.tensors})),
    )


def verify_import(
    source: Path, output: Path, *, dtype: torch.dtype | None = None, progress: bool = False
) -> None:
    """Prove that `output` is what `import_encoder` makes of `source` and `dtype`, bit for bit.

    Raises `ValueError` listing what differs.
    """
    source, output = Path(source), Path(output)
    plan = _make_plan(source, dtype)
    with progress_bar(plan.num_bytes, "verifying", progress) as bar:
        differences = compare(output, "model", plan.tensors, bar.update)
    if json.loads((output / "config.json").read_text()) != plan.config:
        differences.append("config.json does not say the same")
    if differences:
        raise ValueError(f"{output} is not what {source} holds: {'; '.join(differences)}")


def _make_plan(source: Path, dtype: torch.dtype | None) -> _Plan:
    if not source.is_dir():
        raise ValueError(
            f"{source} is not a folder; --from-hub NAME downloads a model of the Hugging Face hub"
        )
    where = source / "config.json"
    if not where.is_file():
        raise ValueError(f"{source} holds no config.json: it must be the folder of a checkpoint")
    config = read_json(where, "the configuration of the encoder")
    layout = find_layout(config, where)
    tower = build_tower(config, layout, where)
    weights = SourceWeights(source)
    origins = _place(tower, layout, weights)
    tensors = []
    # By file, so that each is opened once.
    for name in sorted(tower.shapes, key=lambda name: weights.tensors[origins[name].name].file):
        kept = weights.tensors[origins[name].name].dtype
        read = functools.partial(_read, weights, origins[name])
        tensors.append(StreamedTensor(name, tower.shapes[name], dtype or kept, read))
    return _Plan(layout.family, tower.config, tensors)


def _place(tower: Tower, layout: Layout, weights: SourceWeights) -> dict[str, Origin]:
    """The origin of every parameter. Raises `ValueError` unless the source fits exactly."""
    in_use = [p for p in layout.prefixes if any(n.startswith(p) for n in weights.tensors)]
    prefix = in_use[0] if in_use else layout.prefixes[0]
    origins = {}
    for name in tower.shapes:
        origin = find_origin(name, layout)
        origins[name] = origin._replace(name=prefix + origin.name)
    left_alone = (*layout.others, *(prefix + name for name in layout.unused))
    found = {name for name in weights.tensors if not name.startswith(left_alone)}
    check_names({origin.name for origin in origins.values()}, found, weights.folder)

    problems = []
    for name, (rows, *rest) in tower.shapes.items():
        origin = origins[name]
        stored = weights.tensors[origin.name]
        expected = (rows * origin.parts, *rest)
        if stored.shape != expected:
            problems.append(f"{origin.name} has shape {stored.shape}, not {expected}")
        elif stored.dtype not in _DTYPES:
            problems.append(f"{origin.name} is stored as {stored.dtype}")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"the tensors of {weights.folder} do not fit its config.json: "
            f"{'; '.join(problems[:4])}{more}"
        )
    return origins


def _read(weights: SourceWeights, origin: Origin) -> list[Tensor]:
    """The elements of one parameter. Rows lie one after the other, so a block of them is flat."""
    elements = weights.read(origin.name).reshape(origin.parts, -1)[origin.part]
    if not is_finite(elements):
        file = weights.tensors[origin.name].file
        raise ValueError(f"{origin.name} in {file} holds NaN or infinity: the file is damaged")
    return [elements]
