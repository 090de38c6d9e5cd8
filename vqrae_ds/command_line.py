"""Command lines: a user's mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)


class OneLineParser(argparse.ArgumentParser):
    """Raises `ValueError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help shows an example)")


def run_tool(main: Callable[[], None]) -> None:
    """Run `main`; if it raises `ValueError` or cannot use a path, say so and exit with status 2."""
    try:
        main()
    except USER_ERRORS as error:
        exit_with(error)


def exit_with(error: Exception, *, silent: bool = False, status: int = 2) -> NoReturn:
    """Say what is wrong, unless a peer says the same, and exit with `status`."""
    if not silent:
        message = str(error).strip()
        if "Original Traceback" in message:  # how torch passes on what went wrong in a worker
            message = message.splitlines()[-1].partition(": ")[2]
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(status)
