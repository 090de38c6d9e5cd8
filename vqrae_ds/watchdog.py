"""Ends a job that hangs: a rank without progress writes where it stands and leaves.

A rank that stops, or a node that is gone, leaves its peers waiting in a collective for as long as
the process group allows. The launcher ends all ranks of a node as soon as one has left.

A process has one watchdog at most. Whoever makes progress says so with `begin` and `progress`,
which cost nothing worth a thought, and nothing at all where nobody watches. Waiting for a peer is
no progress, whatever the peer does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO, TypeVar

T = TypeVar("T")

EXIT_STATUS = 3  # 1 is a failure, 2 a user's mistake
DUMP_SECONDS = 30.0  # for each place that the stacks are written to

_current: Watchdog | None = None


class Watchdog:
    """A thread that watches the others.

    Inside the context, after `seconds` without progress, it writes the stacks of all threads to
    stderr and to `folder`/rank_00000.txt, and ends the process with `EXIT_STATUS`, within
    2 x `DUMP_SECONDS` whatever becomes of the writes.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self.seconds, self.folder, self.rank = seconds, Path(folder), rank
        self.what, self.since = "the start", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        global _current
        assert _current is None, "a process has one watchdog"
        _current = self
        self.since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        global _current
        _current = None
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self.seconds / 10, 5.0)):
            if time.monotonic() - self.since > self.seconds:
                _in_bounded_time(lambda: self._dump(sys.stderr))
                _in_bounded_time(self._dump_to_file)
                os._exit(EXIT_STATUS)  # the other threads hang: none of them could be ended

    def _dump(self, file: TextIO) -> None:
        file.write(
            f"rank {self.rank} made no progress for {self.seconds:g} s in {self.what}; "
            "the stacks of its threads:\n"
        )
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)

    def _dump_to_file(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"rank_{self.rank:05d}.txt", "w") as file:
            self._dump(file)


def begin(what: str) -> None:
    """Progress: `what` begins now."""
    if _current is not None:
        _current.what, _current.since = what, time.monotonic()


def progress() -> None:
    """Progress in what has begun. Any thread may say so."""
    if _current is not None:
        _current.since = time.monotonic()


def watching(items: Iterable[T], what: str) -> Iterator[T]:
    """`items`, each of which is progress in `what`."""
    for item in items:
        begin(what)
        yield item


def _in_bounded_time(write: Callable[[], None]) -> None:
    """Give up a `write` that takes too long: the file system may be what hangs, or it is full."""

    def write_or_fail() -> None:
        with contextlib.suppress(OSError):
            write()

    writer = threading.Thread(target=write_or_fail, name="stacks", daemon=True)
    writer.start()
    writer.join(DUMP_SECONDS)
