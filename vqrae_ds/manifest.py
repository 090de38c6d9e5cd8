"""The manifest of a checkpoint folder: its files, how long they are, what they hash to.

`manifest.json` is written last, under a temporary name and renamed, so a folder that has one is
complete. DeepSpeed writes no checksum, and loads a file with a flipped byte without a word.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_READ_BYTES = 1 << 22
_STEP_FOLDER = re.compile(r"step_(\d{8,})")

logger = logging.getLogger(__name__)


class FileRecord(NamedTuple):
    """Size in bytes and XXH3-128 digest (hex) of one file."""

    size: int
    xxh3_128: str


class Layout(NamedTuple):
    """How the ranks shared the model: `dp` shares of the states, of `tp` slices of the weights."""

    dp: int
    tp: int = 1


class Manifest(NamedTuple):
    """What a folder contains; `files` maps a path relative to the folder to its record.

    Without a `layout`, as earlier versions wrote it, all ranks are data-parallel.
    """

    step: int
    stage: int
    world_size: int
    versions: dict[str, str]
    files: dict[str, FileRecord]
    layout: Layout | None = None

    @property
    def num_bytes(self) -> int:
        """Of all files together, this one left out."""
        return sum(record.size for record in self.files.values())


def hash_file(path: Path) -> FileRecord:
    """Read `path` once and return its size and digest."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def list_files(folder: Path) -> list[str]:
    """All files below `folder` that a manifest covers, as sorted relative POSIX paths."""
    paths = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return sorted(p.relative_to(folder).as_posix() for p in paths)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish `folder` as complete. Every file must be on disk, and every rank past its writes."""
    payload = {"format_version": FORMAT_VERSION, **manifest._asdict()}
    payload["files"] = {name: record._asdict() for name, record in manifest.files.items()}
    payload["layout"] = (manifest.layout or Layout(manifest.world_size))._asdict()
    write_json_atomically(Path(folder) / MANIFEST_NAME, payload)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder`.

    Raises `ValueError` when there is none (an interrupted save) or when it cannot be understood.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST_NAME}: it is not a complete checkpoint")
    try:
        payload: dict[str, Any] = json.loads(path.read_text())
        version = payload.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this code reads {FORMAT_VERSION}"
            )
        payload["files"] = {name: FileRecord(**r) for name, r in payload["files"].items()}
        payload["layout"] = Layout(**payload.get("layout", {"dp": payload["world_size"]}))
        return Manifest(**payload)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable manifest: {error}") from error


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """All `step_XXXXXXXX` folders by their steps, complete or not, newest first."""
    steps = {int(m[1]): p for p in checkpoints.glob("*") if (m := _STEP_FOLDER.fullmatch(p.name))}
    return dict(sorted(steps.items(), reverse=True))


def complete_steps(checkpoints: Path) -> list[Path]:
    """The `step_XXXXXXXX` folders with a readable manifest, newest first; others are warned of."""
    complete = []
    for folder in step_folders(checkpoints).values():
        try:
            read_manifest(folder)
        except ValueError as error:
            logger.warning("passing over it: %s", error)
        else:
            complete.append(folder)
    return complete


def find_step_folder(path: Path) -> Path:
    """The first of `find_step_folders`: `path` itself, or the newest complete one of a run."""
    return find_step_folders(path)[0]


def find_step_folders(path: Path) -> list[Path]:
    """The step folders meant by `path`: itself, or the complete ones of a run, newest first.

    `path` may be a step folder, a run's `checkpoints` folder or the run folder. Raises `ValueError`
    when it is none of these, or holds no complete checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    if _STEP_FOLDER.fullmatch(path.name) or (path / MANIFEST_NAME).is_file():
        return [path]
    inside = path / "checkpoints"
    complete = complete_steps(inside if inside.is_dir() else path)
    if not complete:
        raise ValueError(f"{path} holds no complete checkpoint (step_XXXXXXXX/{MANIFEST_NAME})")
    return complete


def find_damage(folder: Path, manifest: Manifest, *, checksums: bool = True) -> list[str]:
    """One line per missing, resized or altered file of `folder`; empty if it is intact."""
    damage = []
    for name, record in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            damage.append(f"{name} is missing")
        elif path.stat().st_size != record.size:
            damage.append(
                f"{name} has {path.stat().st_size} bytes, the manifest says {record.size}"
            )
        elif checksums and hash_file(path) != record:
            damage.append(f"{name} does not match its checksum")
    return damage


def write_json_atomically(path: Path, payload: Any) -> None:
    """Write JSON so that `path` holds its old content or the whole new one, after a crash too."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(payload, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk, which the sync of a file need not do."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
