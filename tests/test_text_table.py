"""Columns of text: aligned, and without spaces that nobody sees."""

from __future__ import annotations

from vqrae_ds.text_table import columns


def test_columns_are_aligned_at_their_side() -> None:
    rows = [("name", "GB", "what"), ("a longer name", "12.50", ""), ("b", "7", "x")]
    assert columns(rows, "<>") == [
        "name              GB  what",
        "a longer name  12.50",
        "b                  7  x",
    ]
    assert columns(rows, ">")[0] == "         name  GB     what"


def test_no_rows_are_no_lines() -> None:
    assert columns([]) == []
