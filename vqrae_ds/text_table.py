"""Rows of text as aligned columns, for what the tools print."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest


def columns(rows: Sequence[Sequence[str]], alignment: str = "") -> list[str]:
    """A line a row, columns two spaces apart, without spaces at the end.

    `alignment` has `<` or `>` for each column from the first; those that it leaves out are `<`.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    assert len(alignment) <= len(widths), f"{alignment!r} for {len(widths)} columns"
    sides = list(zip_longest(widths, alignment, fillvalue="<"))
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, (width, side) in zip(row, sides, strict=True)
        ).rstrip()
        for row in rows
    ]
