"""How far a tool is with the bytes that it reads or writes."""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(total_bytes: int, what: str, visible: bool) -> tqdm:
    """A progress bar in bytes on a terminal, a silent one otherwise."""
    silent = None if visible else True
    return tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, disable=silent)
