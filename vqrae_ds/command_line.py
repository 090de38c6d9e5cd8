"""How a tool ends: a user's mistake is one line on stderr and exit status 2, and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


def run_tool(main: Callable[[], None]) -> None:
    """Run `main`; if it raises `ValueError` or cannot use a path, say so and exit with status 2."""
    try:
        main()
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
