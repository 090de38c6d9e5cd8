"""How much memory a process takes at most while something runs."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def sampled_memory(peaks: dict[str, int]) -> Iterator[None]:
    """Sets `peaks` to the most memory that the process had inside, above that at the start."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be reused unseen
    start, done = read_memory(), threading.Event()

    def sample() -> None:
        is_last = False
        while not is_last:
            is_last = done.wait(0.001)  # one sample is taken however short it was
            for name, now in read_memory().items():
                peaks[name] = max(peaks.get(name, 0), now - start[name])

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def read_memory() -> dict[str, int]:
    """`RssAnon` and `VmRSS` of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return {
        name: int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) << 10
        for name in ("RssAnon", "VmRSS")
    }


def available_memory() -> int:
    """Bytes that this machine can still give to a process without swapping."""
    kilobytes = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]
    return int(kilobytes) << 10
