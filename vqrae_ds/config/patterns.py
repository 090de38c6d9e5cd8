"""One text for many paths: `data/part_{00..31}`, `data/{some,others}`, as a shell writes it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from braceexpand import UnbalancedBracesError, braceexpand

if TYPE_CHECKING:
    from vqrae_ds.config.schema import DataConfig

MAX_PATHS = 1_000_000


def expand_braces(pattern: str) -> list[str]:
    """All paths of a pattern in its order; a text without braces is one path.

    Raises `ValueError` for braces without their peer, and for more than `MAX_PATHS` paths.
    """
    try:
        paths = list(itertools.islice(braceexpand(pattern), MAX_PATHS + 1))
    except UnbalancedBracesError as error:
        raise ValueError(f"{pattern} has a brace without its peer") from error
    if len(paths) > MAX_PATHS:
        raise ValueError(f"{pattern} means more than {MAX_PATHS} paths")
    return paths


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
