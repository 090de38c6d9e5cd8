"""`conversion.json`: what a converted folder was made of, and what its files hash to.

It is written last and sealed, so a folder that has one is whole; from then on a changed byte in any
of its files is found.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vqrae_ds.conversion.progress import progress_bar
from vqrae_ds.manifest import FileRecord, find_damaged_files, read_sealed, write_sealed

RECORD_NAME = "conversion.json"


class Record(NamedTuple):
    """`kind` is the target of the conversion; `files` are all files beside the record.

    `dtype` is that of the trained parameters in them: float32, bfloat16.
    `stage` and `source_manifest_xxh3_128` are None for a checkpoint that had no manifest.
    """

    kind: str
    dtype: str
    ema: bool
    step: int
    stage: int | None
    versions: dict[str, str]
    source_manifest_xxh3_128: str | None
    files: dict[str, FileRecord]


def write_record(folder: Path, record: Record) -> None:
    """Write `conversion.json`. Every other file must be on disk."""
    files = {name: file._asdict() for name, file in record.files.items()}
    write_sealed(folder / RECORD_NAME, {**record._asdict(), "files": files})


def read_record(folder: Path) -> Record:
    """The record of a converted folder.

    Raises `ValueError` where there is none, where it was altered, and where an earlier version
    wrote it, without checksums.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {RECORD_NAME}: tools/convert_checkpoint.py writes one")
    payload = read_sealed(path)
    try:
        payload["files"] = {name: FileRecord(**r) for name, r in payload["files"].items()}
        return Record(**payload)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a record of this version ({error}): convert again"
        ) from error


def find_record(folder: Path) -> Record | None:
    """`read_record`, or None where there is none: `VQRAE.save_pretrained` writes none."""
    return read_record(folder) if (Path(folder) / RECORD_NAME).is_file() else None


def find_damage(
    folder: Path, record: Record, *, checksums: bool = True, progress: bool = False
) -> list[str]:
    """A line for each file that is not as it was written; empty where `folder` is intact."""
    total = sum(file.size for file in record.files.values())
    with progress_bar(total, "checking", progress and checksums) as bar:
        return find_damaged_files(folder, record.files, checksums=checksums, advance=bar.update)
