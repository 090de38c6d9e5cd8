"""How a tool ends: the exit status and the one line that say why."""

from __future__ import annotations

import pytest

from tests.conftest import run_python

SCRIPT = """
import signal
from vqrae_ds.command_line import run_tool

def main():
    {body}

run_tool(main)
"""
# As a library does that makes an error of its own of whatever comes up in it.
SWALLOWED = """
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("cannot be read: KeyboardInterrupt")
"""


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("pass", 0, ""),
        ("raise ValueError('3 is no\\n size')", 2, "error: 3 is no size\n"),
        ("raise OSError(28, 'No space left')", 1, "error: [Errno 28] No space left\n"),
        (
            "raise PermissionError(13, 'Permission denied')",
            2,
            "error: [Errno 13] Permission denied\n",
        ),
        ("signal.raise_signal(signal.SIGINT)", 130, "error: interrupted\n"),
        (SWALLOWED.strip(), 130, "error: interrupted\n"),
        ("signal.raise_signal(signal.SIGTERM)", 143, "error: ended by SIGTERM\n"),
    ],
    ids=["done", "mistake", "full disk", "not allowed", "Ctrl-C", "Ctrl-C swallowed", "kill"],
)
def test_how_a_tool_ends(body: str, status: int, said: str) -> None:
    done = run_python("-c", SCRIPT.format(body=body))
    assert (done.returncode, done.stderr) == (status, said)


def test_what_is_nobodys_mistake_has_its_traceback() -> None:
    done = run_python("-c", SCRIPT.format(body="raise RuntimeError('broken')"))
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
