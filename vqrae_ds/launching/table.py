"""The outcome as text: a row a node, a column a check, and below a line for each broken cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

NAMES_SHOWN = 4


class Cell(NamedTuple):
    """What a check found on a node. `shown` stands in the table, `detail` below it.

    A `note` is no fault. What could not be looked at is `skipped`, and named by another cell.
    """

    state: Literal["ok", "note", "broken", "skipped"]
    shown: str
    detail: str = ""


SKIPPED = Cell("skipped", "-")


def ok(shown: str = "ok") -> Cell:
    """Nothing to complain of."""
    return Cell("ok", shown)


def broken(detail: str) -> Cell:
    """A fault: `detail` says what is wrong and what to do, in one line."""
    return Cell("broken", "BROKEN", " ".join(detail.split()))


def note(shown: str, detail: str) -> Cell:
    """Something to know that stops no run."""
    return Cell("note", shown, detail)


Columns = Mapping[str, Sequence[Cell]]  # a column's cells are in the order of the nodes


def is_sound(columns: Columns) -> bool:
    """Whether no cell is broken."""
    return all(cell.state != "broken" for cells in columns.values() for cell in cells)


def render(nodes: Sequence[str], columns: Columns) -> str:
    """The table, then the notes, then what is broken; equal findings of several nodes in one."""
    rows = [["node", *columns]]
    for i, node in enumerate(nodes):
        rows.append([node, *(cells[i].shown for cells in columns.values())])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    notes, faults = _findings(nodes, columns, "note"), _findings(nodes, columns, "broken")
    if notes or faults:
        lines += ["", *(f"note: {line}" for line in notes), *faults]
    return "\n".join(lines)


def _findings(nodes: Sequence[str], columns: Columns, state: str) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for name, cells in columns.items():
        for node, cell in zip(nodes, cells, strict=True):
            if cell.state == state:
                found.setdefault((name, cell.detail), []).append(node)
    return [f"{_join(where)}  {name}: {detail}" for (name, detail), where in found.items()]


def _join(nodes: Sequence[str]) -> str:
    if len(nodes) <= NAMES_SHOWN:
        return ", ".join(nodes)
    return f"{', '.join(nodes[: NAMES_SHOWN - 1])} and {len(nodes) - NAMES_SHOWN + 1} more"
