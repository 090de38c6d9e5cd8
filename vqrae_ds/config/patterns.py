"""One text for many paths: `data/part_{00..31}`, `data/{some,others}`, as a shell writes it."""

from __future__ import annotations

import itertools
import re

from braceexpand import UnbalancedBracesError, braceexpand

MAX_PATHS = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_MAX_DIGITS = 18


def expand_braces(pattern: str) -> list[str]:
    """All paths of a pattern in its order; a text without braces is one path.

    Raises `ValueError` for braces without their peer, and for more than `MAX_PATHS` paths.
    """
    # A range becomes a list before the first path of its pattern comes out.
    if any(_width(*found.groups()) > MAX_PATHS for found in _RANGE.finditer(pattern)):
        raise ValueError(f"{pattern} means more than {MAX_PATHS} paths")
    try:
        paths = list(itertools.islice(braceexpand(pattern), MAX_PATHS + 1))
    except UnbalancedBracesError as error:
        raise ValueError(f"{pattern} has a brace without its peer") from error
    if len(paths) > MAX_PATHS:
        raise ValueError(f"{pattern} means more than {MAX_PATHS} paths")
    return paths


def _width(first: str, last: str, step: str | None) -> int:
    """How many numbers a range has; more than `MAX_PATHS` where one is too long to be read."""
    if max(len(first), len(last), len(step or "")) > _MAX_DIGITS:
        return MAX_PATHS + 1
    return abs(int(last) - int(first)) // (int(step or 1) or 1) + 1
