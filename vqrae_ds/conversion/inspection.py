"""What a checkpoint or a converted folder holds, and whether it is whole; nothing is written.

Headers and sizes are read; the contents, to compare their checksums, on request alone. It takes a
step folder, a run (its newest complete step), a converted folder, and what plain DeepSpeed wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from vqrae_ds.conversion import record as records
from vqrae_ds.conversion.checkpoint_source import (
    find_checkpoint,
    find_damage_of_checkpoint,
    is_foreign,
)
from vqrae_ds.conversion.rank_checks import find_crc_damage
from vqrae_ds.conversion.rank_files import DISCRIMINATOR, FROZEN_FILE, GENERATOR, entry, load
from vqrae_ds.conversion.record import RECORD_NAME
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.manifest import MANIFEST_NAME, frozen_file, list_files, read_manifest, run_of

# Of safetensors' own names (its README, "Format").
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_DTYPE_BYTES = {"bool": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8} | {
    f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)
}


class TensorEntry(NamedTuple):
    """One tensor. `kind` is trainable, frozen or buffer; stored, where a folder does not say."""

    engine: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * _DTYPE_BYTES.get(self.dtype, 0)


class FileGroup(NamedTuple):
    """How many files of a kind there are, and their bytes together."""

    count: int
    num_bytes: int


class Inspection(NamedTuple):
    """`facts` are lines by their heading; `damage` names each file that is not as it should be."""

    folder: Path
    what: str
    facts: dict[str, str]
    files: dict[str, FileGroup]
    tensors: list[TensorEntry]
    damage: list[str]


def inspect(path: Path, *, verify: bool = False, progress: bool = False) -> Inspection:
    """Look into what `path` means. With `verify` every byte is read and held to its checksum.

    Damage is listed, not raised. Raises `ValueError` where `path` is no folder of a known kind.
    """
    path = Path(path)
    if (path / RECORD_NAME).is_file() or any(path.glob("model*.safetensors")):
        return _inspect_converted(path, verify, progress)
    folder = _newest_incomplete(path) or find_checkpoint(path)
    if is_foreign(folder):
        return _inspect_foreign(folder, verify, progress)
    return _inspect_step(folder, verify, progress)


def _newest_incomplete(path: Path) -> Path | None:
    """The newest step folder of a run that has no complete one."""
    steps = [*path.glob("checkpoints/step_*"), *path.glob("step_*")]
    if not steps or any((step / MANIFEST_NAME).is_file() for step in steps):
        return None
    return max(steps, key=lambda step: (len(step.name), step.name))


def _inspect_step(folder: Path, verify: bool, progress: bool) -> Inspection:
    damage, facts = [], {"complete": "yes"}
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        facts["complete"] = "no"
        damage.append(str(error))
    else:
        facts |= {
            "step": str(manifest.step),
            "stage": str(manifest.stage),
            "world size": str(manifest.world_size),
            "versions": _join(manifest.versions),
        }
        if manifest.frozen is not None:
            file = frozen_file(run_of(folder), manifest.frozen)
            facts["pretrained weights"] = f"{file}, {manifest.frozen.size:,} bytes"
        damage += find_damage_of_checkpoint(folder, manifest, checksums=verify, progress=progress)
    tensors: list[TensorEntry] = []
    for engine in (GENERATOR, DISCRIMINATOR):
        if not (folder / engine).is_dir():
            continue
        try:
            checkpoint = ZeroCheckpoint(folder / engine)
        except ValueError as error:
            damage += [] if damage else [str(error)]
        else:
            facts[engine] = _layout(checkpoint)
            tensors += _entries(engine, checkpoint)
    what = "checkpoint of the trainer"
    return Inspection(folder, what, facts, _group_files(folder), tensors, damage)


def _inspect_foreign(folder: Path, verify: bool, progress: bool) -> Inspection:
    facts: dict[str, str] = {"checksums": "none but the CRC-32 of each record"}
    files = sorted(folder.glob("*.pt"))
    damage = find_crc_damage(files, progress=progress) if verify else []
    tensors: list[TensorEntry] = []
    try:
        checkpoint = ZeroCheckpoint(folder)
    except ValueError as error:
        damage += [] if damage else [str(error)]
    else:
        facts["step"] = str(checkpoint.step)
        facts["versions"] = f"deepspeed {checkpoint.deepspeed_version}"
        facts["engine"] = _layout(checkpoint)
        tensors += _entries("engine", checkpoint)
    what = "checkpoint of plain DeepSpeed, without a manifest"
    return Inspection(folder, what, facts, _group_files(folder), tensors, damage)


def _inspect_converted(folder: Path, verify: bool, progress: bool) -> Inspection:
    facts, damage = {}, []
    if not (folder / RECORD_NAME).is_file():
        facts["checksums"] = f"none: it has no {RECORD_NAME}"
    else:
        try:
            record = records.read_record(folder)
        except ValueError as error:
            damage.append(str(error))
        else:
            facts = {
                "converted for": record.kind,
                "dtype": record.dtype,
                "moving averages": "yes" if record.ema else "no",
                "step": str(record.step),
                "stage": str(record.stage or "not recorded"),
                "versions": _join(record.versions),
            }
            damage += records.find_damage(folder, record, checksums=verify, progress=progress)
    tensors: list[TensorEntry] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors += _stored_entries(path)
        except (SafetensorError, OSError) as error:
            damage.append(f"{path.name} cannot be read: {error}")
    return Inspection(folder, "converted folder", facts, _group_files(folder), tensors, damage)


def _entries(engine: str, checkpoint: ZeroCheckpoint) -> Iterator[TensorEntry]:
    for name, info in checkpoint.tensors.items():
        dtype = str(info.dtype).removeprefix("torch.")
        yield TensorEntry(engine, name, info.shape, dtype, info.kind)


def _stored_entries(path: Path) -> Iterator[TensorEntry]:
    engine = path.stem if path.stem == DISCRIMINATOR else "model"
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a handle, not a dict
            found = file.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(found.get_dtype(), found.get_dtype())
            yield TensorEntry(engine, name, tuple(found.get_shape()), dtype, "stored")


def _layout(checkpoint: ZeroCheckpoint) -> str:
    """Data-parallel times tensor-parallel ranks."""
    file = checkpoint.files.optimizers[0]
    state = entry(load(file), "optimizer_state_dict", dict, file)
    # Only DeepSpeed's BF16_Optimizer leaves its stage out, and that one is ZeRO-1.
    stage = int(entry({"zero_stage": 1, **state}, "zero_stage", int, file))
    return f"ZeRO-{stage}, dp {checkpoint.num_ranks} x tp {checkpoint.tensor_size}"


def _group_files(folder: Path) -> dict[str, FileGroup]:
    groups: dict[str, FileGroup] = {}
    names = list_files(folder) + [MANIFEST_NAME] * (folder / MANIFEST_NAME).is_file()
    for name in names:
        kind = _kind_of_file(Path(name).name)
        count, num_bytes = groups.get(kind, FileGroup(0, 0))
        groups[kind] = FileGroup(count + 1, num_bytes + (folder / name).stat().st_size)
    return groups


def _kind_of_file(name: str) -> str:
    kinds = {
        "_model_states.pt": "model states",
        "_optim_states.pt": "optimizer states",
        FROZEN_FILE: "frozen weights",
        ".safetensors": "weights",
        ".json": "descriptions",
    }
    if name.startswith(("ema_rank_", "rng_rank_")):
        return "moving averages" if name.startswith("ema") else "random states"
    return next((kind for end, kind in kinds.items() if name.endswith(end)), "other")


def _join(versions: dict[str, str]) -> str:
    return json.dumps(versions)[1:-1].replace('"', "").replace(":", "")
