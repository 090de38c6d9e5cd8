"""A disk that takes no more, for one process: the system refuses to let a file grow."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def small_files_only(max_bytes: int) -> Iterator[None]:
    """Inside, a write beyond `max_bytes` of a file fails with `OSError` (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
