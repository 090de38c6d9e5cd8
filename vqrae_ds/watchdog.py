"""Ends a job that hangs: a rank without progress writes where it stands and leaves.

A rank that stops, or a node that is gone, leaves its peers waiting in a collective for as long as
the process group allows. The launcher ends all ranks of a node as soon as one has left.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

EXIT_STATUS = 3  # 1 is a failure, 2 a user's mistake


class Watchdog:
    """A thread that watches the others.

    Inside the context, after `seconds` without a call of `beat`, it writes the stacks of all
    threads to stderr and to `folder`/rank_00000.txt, and ends the process with `EXIT_STATUS`.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self.seconds, self.folder, self.rank = seconds, Path(folder), rank
        self._what, self._since = "the start", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._ended.set()

    def beat(self, what: str) -> None:
        """Progress: `what` begins now."""
        self._what, self._since = what, time.monotonic()

    def watching(self, items: Iterable[T], what: str) -> Iterator[T]:
        """`items`, each of which is progress in `what`."""
        for item in items:
            self.beat(what)
            yield item

    def _watch(self) -> None:
        while not self._ended.wait(min(self.seconds / 10, 5.0)):
            if time.monotonic() - self._since > self.seconds:
                self._dump()
                os._exit(EXIT_STATUS)  # the other threads hang: none of them could be ended

    def _dump(self) -> None:
        message = (
            f"rank {self.rank} made no progress for {self.seconds:g} s in {self._what}; "
            "the stacks of its threads:\n"
        )
        sys.stderr.write(message)
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        with contextlib.suppress(OSError):  # the file system may be what hangs or is full
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"rank_{self.rank:05d}.txt", "w") as file:
                file.write(message)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
