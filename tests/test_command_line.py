"""How a tool ends: the exit status and the one line that say why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python
from tests.launching import finish, write_configs

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
BROKEN_PIPE = "raise BrokenPipeError(32, 'Broken pipe')"


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


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "not buffered"])
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("print('short')", 141, ""),
        ("print('long' * 100_000)", 141, ""),
        ("print('short', flush=True); raise SystemExit(1)", 141, ""),
        ("raise SystemExit(1)", 1, ""),
        ("raise ValueError('3 is no size')", 2, "error: 3 is no size\n"),
        (BROKEN_PIPE, 141, ""),
    ],
    ids=["short", "long", "then status 1", "status 1", "mistake", "any pipe"],
)
def test_a_reader_that_has_gone_is_no_error(
    options: list[str], body: str, status: int, said: str
) -> None:
    assert ended_without_reader(*options, "-c", SCRIPT.format(body=body)) == (status, said)


def test_what_is_left_to_be_written_at_the_end_is_no_error_either() -> None:
    body = "print('short'); raise SystemExit(1)"
    assert ended_without_reader("-c", SCRIPT.format(body=body)) == (1, "")
    said = ended_without_reader("tools/make_shards.py", "--help")
    assert said == (0, ""), "argparse ends with its own status"


@pytest.mark.parametrize(
    ("seconds", "ending"),
    [(0.1, ""), (600, "threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()")],
    ids=["left alone", "ended by its launcher"],
)
def test_a_silent_rank_ends_by_itself_or_when_it_is_told_to(seconds: float, ending: str) -> None:
    body = f"""import os, signal, threading
from vqrae_ds import command_line
command_line.PEER_SECONDS = {seconds}
{ending}
command_line.exit_with(ValueError("3 is no size"), silent=True)"""
    done = run_python("-c", body)
    assert (done.returncode, done.stderr) == (2, "")


def test_of_ranks_with_the_same_mistake_one_speaks_although_it_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends every rank when the first has ended."""
    late = "import os, time\nif os.environ.get('LOCAL_RANK') == '0':\n    time.sleep(4)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    write_configs(tmp_path, tmp_path / "no_lpips")
    done = finish(tmp_path, 1, "losses.perceptual.wieght=1")
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert "did you mean losses.perceptual.weight?" in said[0]


def test_a_broken_pipe_of_our_own_is_said() -> None:
    done = run_python("-c", SCRIPT.format(body=BROKEN_PIPE))
    assert (done.returncode, done.stderr) == (1, "error: [Errno 32] Broken pipe\n")


def ended_without_reader(*arguments: str) -> tuple[int, str]:
    """Exit status and stderr of a Python whose stdout nobody reads, as behind `| head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    return done.returncode, done.stderr


def test_what_is_nobodys_mistake_has_its_traceback() -> None:
    done = run_python("-c", SCRIPT.format(body="raise RuntimeError('broken')"))
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
