"""A folder that a conversion writes: complete and synced under its name, or not there at all.

What an interrupted conversion left is removed by the next one. One that still writes holds a lock
on its folder, which the kernel lets go of however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqrae_ds.manifest import sync

logger = logging.getLogger(__name__)

_SMALL_FILES_BYTES = 1 << 20  # headers, index, configuration and record


def check_free(output: Path) -> None:
    """Raise `ValueError` where `output` exists, unless it is an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise ValueError(f"{output} exists already: remove it or choose another name")


def check_space(output: Path, num_bytes: int) -> None:
    """Raise `ValueError` where the disk of `output` has less than `num_bytes` free."""
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    needed, free = num_bytes + _SMALL_FILES_BYTES, shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{output} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {existing}"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into. It gets that name at the end, or is removed.

    Raises `OSError` that says so where writing fails, on a full disk for example.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in output.parent.glob(f".{output.name}.*.partial"):
        _remove_leftover(leftover)
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        with _locked(partial):
            yield partial
            os.rename(partial, output)
        sync(output.parent)
    except OSError as error:
        raise OSError(f"{output} could not be written, nothing of it is left: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there after the rename


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of `folder` and gives True; gives False where another process has it, or
    where the file system knows no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def _remove_leftover(folder: Path) -> None:
    with _locked(folder) as is_ours:
        if is_ours:
            logger.warning("%s: left by an interrupted conversion, removed", folder)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            logger.warning("%s: left by an interrupted conversion, or still being written", folder)
