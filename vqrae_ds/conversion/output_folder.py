"""A folder that a conversion writes: complete and synced under its name, or not there at all."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger(__name__)


def check_free(output: Path) -> None:
    """Raise `ValueError` where `output` exists, unless it is an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise ValueError(f"{output} exists already: remove it or choose another name")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into. It gets that name at the end, or is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in output.parent.glob(f".{output.name}.*.partial"):
        logger.warning("%s: left by an interrupted conversion, or by one still running", leftover)
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        os.rename(partial, output)
        sync(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there after the rename


def progress_bar(total_bytes: int, what: str, visible: bool) -> tqdm:
    """A progress bar in bytes on a terminal, a silent one otherwise."""
    silent = None if visible else True
    return tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, disable=silent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
