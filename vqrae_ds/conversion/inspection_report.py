"""An inspection as text: facts, files, a table of tensors, totals by part, damage; or as JSON.

Blocks that repeat are one line, `encoder.layer.{0..44}.mlp.fc1.weight` x 45, unless all are wanted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vqrae_ds.conversion.inspection import Inspection, TensorEntry
from vqrae_ds.text_table import columns

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_MODEL_PREFIX = "vqrae."


class Line(NamedTuple):
    """One line of the table: tensors that differ in one number of their names alone."""

    name: str
    count: int
    entry: TensorEntry  # the first of them


def as_text(inspection: Inspection, *, every_tensor: bool = False, verified: bool = False) -> str:
    """The whole report; `verified` says that the checksums were compared."""
    found = inspection
    state = "DAMAGED" if found.damage else "intact"
    by = "" if found.damage else " by checksums" if verified else " by its sizes and headers"
    parts = [f"{found.folder}: {found.what}, {state}{by}"]
    parts += columns([(f"  {name}", value) for name, value in found.facts.items()])
    files = [
        (f"  {kind}", f"{group.count} files", show_bytes(group.num_bytes))
        for kind, group in sorted(found.files.items())
    ]
    parts += ["files", *columns(files)]
    if found.tensors:
        parts += ["tensors", *columns(_table(found.tensors, every_tensor))]
        parts += ["totals", *columns(_totals(found.tensors))]
    if found.damage:
        parts += ["damage", *(f"  {line}" for line in found.damage)]
    return "\n".join(parts)


def as_json(inspection: Inspection) -> str:
    """The same, every tensor by itself."""
    found: dict[str, Any] = inspection._asdict()
    found["folder"] = str(inspection.folder)
    found["files"] = {kind: group._asdict() for kind, group in inspection.files.items()}
    found["tensors"] = [
        {**entry._asdict(), "bytes": entry.num_bytes} for entry in inspection.tensors
    ]
    return json.dumps({**found, "intact": not inspection.damage}, indent=2) + "\n"


def summarize(tensors: Iterable[TensorEntry]) -> list[Line]:
    """Tensors whose names differ in their first number alone, and in nothing else, as one line."""
    groups: dict[tuple, list[TensorEntry]] = {}
    for entry in tensors:
        pattern = _NUMBER.sub("{}", entry.name, count=1)
        key = (entry.engine, pattern, entry.shape, entry.dtype, entry.kind)
        groups.setdefault(key, []).append(entry)
    lines = []
    for (_, pattern, *_), entries in groups.items():
        name = entries[0].name
        if len(entries) > 1:
            numbers = sorted(int(_NUMBER.search(entry.name)[0]) for entry in entries)
            name = pattern.replace("{}", f"{{{_ranges(numbers)}}}", 1)
        lines.append(Line(name, len(entries), entries[0]))
    return lines


def show_bytes(number: int) -> str:
    """A size to read: 3 digits and a decimal unit, whole GB from 1000 on."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        value = float(f"{number / size:.3g}")  # rounded first: 999.6 MB are 1 GB
        if value >= 1000:
            return f"{round(number / size)} {unit}"
        if value >= 1:
            return f"{value:.3g} {unit}"
    return f"{number} B"


def _table(tensors: list[TensorEntry], every_tensor: bool) -> list[tuple[str, ...]]:
    lines = [Line(t.name, 1, t) for t in tensors] if every_tensor else summarize(tensors)
    rows = [("  name", "", "shape", "dtype", "kind", "bytes")]
    for name, count, entry in lines:
        times = f"x {count}" if count > 1 else ""
        shape = " x ".join(map(str, entry.shape)) or "-"
        size = show_bytes(count * entry.num_bytes)
        rows.append((f"  {name}", times, shape, entry.dtype, entry.kind, size))
    return rows


def _totals(tensors: list[TensorEntry]) -> list[tuple[str, ...]]:
    """A row for each part of the model and kind of tensor, and one for all."""
    groups: dict[tuple[str, str], list[TensorEntry]] = {}
    for entry in tensors:
        groups.setdefault((_part(entry), entry.kind), []).append(entry)
    rows = [("  part", "kind", "tensors", "elements", "bytes")]
    for (part, kind), entries in sorted(groups.items()) + [(("all", ""), tensors)]:
        elements = f"{sum(entry.numel for entry in entries):,}"
        size = show_bytes(sum(entry.num_bytes for entry in entries))
        rows.append((f"  {part}", kind, str(len(entries)), elements, size))
    return rows


def _part(entry: TensorEntry) -> str:
    """The model's part by its first name, the discriminator as a whole."""
    if entry.engine == "discriminator":
        return entry.engine
    return entry.name.removeprefix(_MODEL_PREFIX).partition(".")[0]


def _ranges(numbers: Sequence[int]) -> str:
    """`0..44`, or `0..3,7` where some are not there."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
