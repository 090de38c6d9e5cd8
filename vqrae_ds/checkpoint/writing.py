"""What one rank writes of a checkpoint: each file hashed on its way and synced, no error raised.

Among the writes of a save are collectives, DeepSpeed's and the trainer's. A rank that raised alone
would leave its peers waiting in one of them, so the first `OSError` is kept, nothing more is
written after it, and the ranks compare at the end. The checksums are those of what was written, not
of what a disk gave back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash

from vqrae_ds import watchdog
from vqrae_ds.manifest import FileRecord, hash_file, list_files, sync

_READ_BYTES = 1 << 22
# A file is synced as it grows: one sync at its end could take as long as the whole save, with
# nothing to be seen of it.
_SYNCED_BYTES = 1 << 28


class Failure(NamedTuple):
    """The first thing that went wrong for a rank."""

    rank: int
    path: str
    error: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.path}: {self.error}"


class RankWriter:
    """Writes below `folder`, and keeps a record of each file by its path in there.

    Unless `synced` a file is left to the operating system, and may be lost with its machine.
    """

    def __init__(self, folder: Path, *, synced: bool = True) -> None:
        self.folder, self.synced = Path(folder), synced
        self.rank = dist.get_rank()
        self.records: dict[str, FileRecord] = {}
        self.failure: Failure | None = None

    def save(self, state: Any, path: Path) -> None:
        """`torch.save`, which need not learn of an error of the file."""
        self._write(path, lambda file: torch.save(state, file))

    def write_text(self, path: Path, text: str) -> None:
        """A small file."""
        self._write(path, lambda file: file.write(text.encode()))

    def copy(self, source: Path, path: Path) -> None:
        """The file `source`, and the folders above `path` that there are not yet."""

        def fill(file: _HashedFile) -> None:
            with open(source, "rb") as original:
                while file.error is None and (chunk := original.read(_READ_BYTES)):
                    file.write(chunk)

        with self.attempt(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._write(path, fill)

    @contextlib.contextmanager
    def attempt(self, path: Path) -> Iterator[None]:
        """Inside, an `OSError` ends the block, and is kept if it is the first; `path` names it."""
        try:
            yield
        except OSError as error:
            self.fail(error.filename or path, error.strerror or str(error))

    def fail(self, path: Path | str, error: str) -> None:
        """Keep what went wrong, if it is the first thing."""
        self.failure = self.failure or Failure(self.rank, str(path), error)

    def add_unrecorded(self, names: set[str]) -> None:
        """Hash and sync every file in the folder that is not in `names`: others wrote it for us."""
        with self.attempt(self.folder):
            for name in set(list_files(self.folder)) - names:
                if self.synced:
                    sync(self.folder / name)
                self.records[name] = hash_file(self.folder / name)

    @contextlib.contextmanager
    def replacing_writes_of(self, engine: Any) -> Iterator[None]:
        """Inside, what the DeepSpeed `engine` writes of a checkpoint is written here.

        Of `DeepSpeedEngine.save_checkpoint` in deepspeed 0.19.8 there remain the collectives, and
        what is to be written.
        """
        checkpoint_engine, copy_scripts = engine.checkpoint_engine, engine._copy_recovery_script

        def copy_scripts_or_fail(folder: str) -> None:
            with self.attempt(Path(folder) / "zero_to_fp32.py"):
                copy_scripts(folder)

        engine.checkpoint_engine = _CheckpointEngine(checkpoint_engine, self)
        engine._copy_recovery_script = copy_scripts_or_fail
        try:
            yield
        finally:
            engine.checkpoint_engine = checkpoint_engine
            del engine._copy_recovery_script  # that of the class is in its place again

    def _write(self, path: Path, fill: Callable[[_HashedFile], object]) -> None:
        """A new file and its record, unless something has failed."""
        if self.failure is not None:
            return
        with self.attempt(path):
            with _HashedFile(path, self.synced) as file:
                fill(file)
            self.records[Path(path).relative_to(self.folder).as_posix()] = file.record()


class _CheckpointEngine:
    """DeepSpeed's, but for its two methods that write."""

    def __init__(self, theirs: Any, writer: RankWriter) -> None:
        self._theirs, self._writer = theirs, writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self._writer.attempt(Path(path)):
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        self._writer.save(state_dict, Path(path))


class _HashedFile:
    """A file to write, from its beginning to its end; as a context it is closed, `synced` or not.

    An error is raised at the end of the context. `write` raises none: torch calls it from C++, and
    hides it behind the failures that follow from it. Each piece is progress to the watchdog.
    """

    def __init__(self, path: Path, synced: bool) -> None:
        self.error: OSError | None = None
        self._file, self._synced = open(path, "wb"), synced  # noqa: SIM115 - closed by the context
        self._digest, self._size, self._num_synced = xxhash.xxh3_128(), 0, 0

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.flush()
        self._sync()
        try:
            self._file.close()
        except OSError as error:  # what was held back could not be written either
            self.error = self.error or error
        if self.error is not None and kind is None:
            raise self.error

    def write(self, data: Any) -> int:
        """All of `data`, in the eyes of the caller."""
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, _SYNCED_BYTES):
            piece = view[start : start + _SYNCED_BYTES]
            self._unless_failed(lambda piece=piece: self._file.write(piece))
            self._digest.update(piece)
            self._size += piece.nbytes
            if self._size - self._num_synced >= _SYNCED_BYTES:
                self.flush()
                self._sync()
            watchdog.progress()
        return view.nbytes

    def flush(self) -> None:
        """As `write`."""
        self._unless_failed(self._file.flush)

    def _sync(self) -> None:
        if self._synced:
            self._unless_failed(lambda: os.fsync(self._file.fileno()))
        self._num_synced = self._size

    def record(self) -> FileRecord:
        """Of what was written."""
        return FileRecord(self._size, self._digest.hexdigest())

    def _unless_failed(self, act: Callable[[], object]) -> None:
        if self.error is None:
            try:
                act()
            except OSError as error:
                self.error = error
