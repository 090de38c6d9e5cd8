"""The manifest of a checkpoint folder: its files, how long they are, what they hash to.

`manifest.json` is written last, under a temporary name and renamed, so a folder that has one is
complete. DeepSpeed writes no checksum, and loads a file with a flipped byte without a word. The
manifest vouches for itself too: it is sealed (`write_sealed`).

The frozen pretrained weights of a run are not in its checkpoints but once in `RUN/frozen`, in a
file that is called by the digest of its content. A manifest vouches for that file too.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from vqrae_ds import watchdog

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)  # in the first one all frozen weights were in the step folder
_SEAL = "seal_xxh3_128"
_READ_BYTES = 1 << 22
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_DIGEST = re.compile(r"[0-9a-f]{32}")

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

    `frozen` is the file of the run with its frozen pretrained weights (see `frozen_file`), None
    where a run has none. Without a `layout`, as earlier versions wrote it, all ranks are
    data-parallel.
    """

    step: int
    stage: int
    world_size: int
    versions: dict[str, str]
    files: dict[str, FileRecord]
    frozen: FileRecord | None = None
    layout: Layout | None = None

    @property
    def num_bytes(self) -> int:
        """Of all files together, this one left out."""
        return sum(record.size for record in self.files.values())


def hash_file(path: Path, advance: Callable[[int], object] | None = None) -> FileRecord:
    """Read `path` once and return its size and digest; `advance` is told the bytes of each read."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if advance is not None:
                advance(len(chunk))
            watchdog.progress()
    return FileRecord(size, digest.hexdigest())


def frozen_file(run_folder: Path, record: FileRecord) -> Path:
    """Where a run keeps its frozen pretrained weights of this record."""
    return Path(run_folder) / "frozen" / f"{record.xxh3_128}.safetensors"


def run_of(step_folder: Path) -> Path:
    """The run folder that a step folder belongs to, whether that is given by a link or not."""
    return Path(step_folder).resolve().parent.parent


def list_files(folder: Path) -> list[str]:
    """All files below `folder` that a manifest covers, as sorted relative POSIX paths."""
    paths = (p for p in Path(folder).rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return sorted(p.relative_to(folder).as_posix() for p in paths)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish `folder` as complete. Every file must be on disk, and every rank past its writes."""
    payload = {"format_version": FORMAT_VERSION, **manifest._asdict()}
    payload["files"] = {name: record._asdict() for name, record in manifest.files.items()}
    payload["frozen"] = manifest.frozen and manifest.frozen._asdict()
    payload["layout"] = (manifest.layout or Layout(manifest.world_size))._asdict()
    write_sealed(Path(folder) / MANIFEST_NAME, payload)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder`.

    Raises `ValueError` when there is none (an interrupted save), when the disk does not give it
    back, when it cannot be understood, and when it is of another step than the folder's name says.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        if not path.is_file():
            raise ValueError(f"{folder} has no {MANIFEST_NAME}: it is not a complete checkpoint")
        payload = read_sealed(path)
        version = payload.pop("format_version")
        if version not in _READABLE_VERSIONS:
            raise ValueError(
                f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}"
            )
        payload["files"] = {name: FileRecord(**r) for name, r in payload["files"].items()}
        if payload.get("frozen") is not None:
            payload["frozen"] = _frozen_record(payload["frozen"])
        payload["layout"] = Layout(**payload.get("layout", {"dp": payload["world_size"]}))
        manifest = Manifest(**payload)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable manifest: {error}") from error
    named = _STEP_FOLDER.fullmatch(Path(folder).resolve().name)
    if named and int(named[1]) != manifest.step:
        raise ValueError(f"{path} is of step {manifest.step}, its folder is named {named[0]}")
    return manifest


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
        is_converted = any(path.glob("model*.safetensors*"))
        hint = "; it has weights that are converted already" if is_converted else ""
        wanted = f"step_XXXXXXXX/{MANIFEST_NAME}"
        raise ValueError(f"{path} holds no complete checkpoint ({wanted}){hint}")
    return complete


def find_damage(
    folder: Path,
    manifest: Manifest,
    *,
    checksums: bool = True,
    advance: Callable[[int], object] | None = None,
) -> list[str]:
    """One line per missing, resized, altered or unreadable file of `folder`; empty if it is intact.

    The run's file of frozen weights counts as one of them. `advance` is as in `hash_file`.
    """
    options = {"checksums": checksums, "advance": advance}
    damage = find_damaged_files(folder, manifest.files, **options)
    if manifest.frozen is not None:
        path = frozen_file(run_of(folder), manifest.frozen)
        if not os.path.lexists(path):
            damage.append(missing_frozen(path))
        else:
            files = {path.name: manifest.frozen}
            found = find_damaged_files(path.parent, files, **options)
            damage += [f"{path.parent}/{line}" for line in found]
    return damage


def missing_frozen(path: Path) -> str:
    """What to say where the run's file of frozen weights is not there."""
    return (
        f"{path} is missing: the folder {path.parent.name}/ of a run belongs to its checkpoints, "
        "keep and copy it with them"
    )


def find_damaged_files(
    folder: Path,
    files: Mapping[str, FileRecord],
    *,
    checksums: bool = True,
    advance: Callable[[int], object] | None = None,
) -> list[str]:
    """As `find_damage`, of files by their paths relative to `folder`."""
    damage = []
    for name, record in files.items():
        path = Path(folder) / name
        try:
            if not path.is_file():
                damage.append(f"{name} is missing")
            elif (found := path.stat().st_size) != record.size:
                damage.append(f"{name} has {found} bytes, the manifest says {record.size}")
            elif checksums and hash_file(path, advance) != record:
                damage.append(f"{name} does not match its checksum")
        except OSError as error:
            damage.append(f"{name} cannot be read: {error}")
    return damage


def _frozen_record(payload: dict[str, Any]) -> FileRecord:
    """The record, held to a digest: it becomes a path."""
    record = FileRecord(**payload)
    if not _DIGEST.fullmatch(record.xxh3_128):
        raise TypeError(f"{record.xxh3_128!r} is no XXH3-128 digest")
    return record


def write_sealed(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically, that any change of a byte makes unreadable.

    Under a key of its own it holds the digest of the file in which that digest is zeros.
    """
    write_json_atomically(path, {**payload, _SEAL: _seal(payload)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The object that `write_sealed` wrote; one without a seal, of an earlier version, as it is.

    Raises `ValueError` where the file is not what was written.
    """
    content = path.read_bytes()
    try:
        payload = json.loads(content)
    except ValueError as error:  # a `JSONDecodeError`, or text that is not UTF-8
        raise ValueError(f"{path} is not a readable {path.stem}: {error}") from error
    if isinstance(payload, dict) and _SEAL in payload:
        seal = payload.pop(_SEAL)
        if seal != _seal(payload) or content != _encode({**payload, _SEAL: seal}):
            raise ValueError(f"{path} was altered after it was written: its seal is broken")
    return payload


def _seal(payload: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_encode({**payload, _SEAL: "0" * 32}))


def _encode(payload: Any) -> bytes:
    return (json.dumps(payload, indent=2, sort_keys=True) + "\n").encode()


def write_json_atomically(path: Path, payload: Any) -> None:
    """Write JSON so that `path` holds its old content or the whole new one, after a crash too."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(_encode(payload))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file that is written, or the names in a folder, to the disk.

    The sync of a file need not bring its name there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
