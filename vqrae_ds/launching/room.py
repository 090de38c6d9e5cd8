"""Whether the checkpoints of a run fit on the disks: cells of the doctor's table.

The trainer counts the same at its start, and warns (`checkpoint.space`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqrae_ds.launching.needs import Needs
from vqrae_ds.launching.table import Cell, broken, ok

GB = 10**9


def for_run(disk: Mapping[str, Any], needs: Needs) -> Cell:
    """A cell on the disk of the run's folder, from the probe's `disk`."""
    free, size = disk["free"], disk["size"] or needs.checkpoint_bytes
    more = max(needs.most_checkpoints - disk["checkpoints"], 0)
    once = 0 if disk["has_frozen"] else needs.pretrained_bytes
    if free >= more * size + once:
        return ok(f"{_in_units(free)} free")
    frozen = f", and {_in_units(once)} of frozen weights," if once else ""
    return broken(
        f"{_in_units(free)} free in {needs.run_folder}, but {more} more checkpoints of "
        f"{_in_units(size)}{frozen} are to come (checkpoint.keep_last, keep_every): make room, or "
        "name another run.output_dir"
    )


def on_node(free: int, share: float, needs: Needs) -> Cell:
    """A cell on a node's own disk, which gets its `share` of a checkpoint."""
    needed = needs.checkpoint_bytes * share
    if free >= needed:
        return ok(f"{_in_units(free)} free")
    return broken(
        f"{_in_units(free)} free in {needs.local_dir}, but its share of a checkpoint has "
        f"{_in_units(needed)}: make room, or name another checkpoint.local_dir"
    )


def _in_units(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB else f"{size / 10**6:,.1f} MB"
