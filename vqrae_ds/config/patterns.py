"""One text for many paths: `data/part_{00..31}`, `data/{some,others}`, as a shell writes it."""

from __future__ import annotations

import itertools

from braceexpand import UnbalancedBracesError, braceexpand

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
