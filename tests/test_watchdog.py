"""The watchdog in processes of its own, which it ends. Ranks: integration/test_endings."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import start_python
from vqrae_ds.watchdog import EXIT_STATUS

SECONDS = 0.5

# argv: folder. It makes progress for longer than the limit, in two ways, and then stands still.
PROGRAM = f"""
import sys, time
from pathlib import Path
from vqrae_ds import watchdog
from vqrae_ds.manifest import hash_file

def stands_still():
    time.sleep(60)

watchdog.DUMP_SECONDS = 1.0
folder = Path(sys.argv[1])
with watchdog.Watchdog({SECONDS}, folder / "stacks", rank=7):
    for number in range(4):
        time.sleep({SECONDS} / 2)
        watchdog.begin("something else")
    watchdog.begin("what never ends")
    for number in range(4):
        time.sleep({SECONDS} / 2)
        hash_file(folder / "data")
    print("on its way", flush=True)
    stands_still()
"""


def start(folder: Path) -> subprocess.Popen[str]:
    (folder / "stacks").mkdir()
    (folder / "data").write_bytes(b"data")
    return start_python("-c", PROGRAM, str(folder))


def test_a_process_without_progress_leaves_its_stacks(tmp_path):
    process = start(tmp_path)
    said, stacks = process.communicate(timeout=20)
    assert process.returncode == EXIT_STATUS
    assert said == "on its way\n", "each piece that is hashed is progress, as is what begins"
    assert f"rank 7 made no progress for {SECONDS} s in what never ends" in stacks
    assert "in stands_still" in stacks
    assert "in stands_still" in (tmp_path / "stacks" / "rank_00007.txt").read_text()


@pytest.mark.parametrize("blocked", ["file", "stderr"])
def test_a_process_leaves_where_its_stacks_cannot_be_written(tmp_path, blocked):
    """A pipe that nobody reads is like a file system that does not answer."""
    start_time = time.monotonic()
    process = start(tmp_path)
    if blocked == "file":
        os.mkfifo(tmp_path / "stacks" / "rank_00007.txt")
        assert "in stands_still" in process.communicate(timeout=20)[1]
    else:
        with open(f"/proc/{process.pid}/fd/2", "wb", buffering=0, opener=_without_blocking) as pipe:
            while pipe.write(b"." * 4096):
                pass
        assert process.wait(timeout=20) == EXIT_STATUS
        assert "in stands_still" in (tmp_path / "stacks" / "rank_00007.txt").read_text()
    assert process.returncode == EXIT_STATUS
    assert time.monotonic() - start_time < 15


def _without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
