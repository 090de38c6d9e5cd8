"""One text for many paths: `data/part_{00..31}`, `data/{some,others}`, as a shell writes it."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from braceexpand import UnbalancedBracesError, braceexpand

if TYPE_CHECKING:
    from vqrae_ds.config.schema import DataConfig

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


def data_folders(data: DataConfig) -> dict[str, str]:
    """The folders with an index that a run reads, by what each of them is set by."""
    patterns = {"data.train": data.train, "data.validation": data.validation}
    if data.streaming is not None:
        del patterns["data.train"]
    found = {}
    for name, pattern in patterns.items():
        for number, path in enumerate(expand_braces(pattern) if pattern else []):
            found[name if number == 0 else f"{name} ({number + 1})"] = path
    return found
