"""The run folder explains itself: both files as resolved, what the run runs on, and who trains it.

Two starts of one run would write one log and the same checkpoints, each over the other's. A start
holds a lock of the kernel, which goes with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import re
import subprocess
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import IO

import yaml

from vqrae_ds import __version__
from vqrae_ds.config import Run

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"  # says who has it
# A start that was asked to stop saves for a while; one whose machine died keeps a file server's
# lock for a minute and a half.
WAIT_SECONDS = 120.0
_HELD = (errno.EACCES, errno.EAGAIN)


def record(run: Run) -> None:
    """Write `config.yaml`, `deepspeed.json` and `environment.json`."""
    folder = Path(run.config.run.output_dir)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(), sort_keys=False))
    (folder / "deepspeed.json").write_text(json.dumps(run.deepspeed, indent=2) + "\n")
    environment = {
        "version": __version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "ranks": run.schedule.batch.world_size,
        "packages": {package.name: package.version for package in distributions()},
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def enter(folder: Path, rank: int) -> IO[str] | None:
    """Make the run's folder; the first rank keeps other starts out of it, see `lock`."""
    folder.mkdir(parents=True, exist_ok=True)
    return lock(folder) if rank == 0 else None


def lock(folder: Path, wait_seconds: float = WAIT_SECONDS) -> IO[str]:
    """The right to train in `folder`, as long as what is returned stays open in this process.

    Waits for another start to end. Where it does not, takes its place if it is an earlier start of
    this very SLURM job, else raises `ValueError`; a file system without locks is a warning.
    """
    path, own = folder / LOCK_NAME, _this_process()
    file = open(path, "a+")  # noqa: SIM115 - open as long as the caller wants it
    deadline = time.monotonic() + wait_seconds
    is_told = False
    while (reason := _try(file)) in _HELD:
        file.seek(0)
        holder = file.read().strip() or "another process"
        owner = f"{folder} is in training by {holder}"
        if time.monotonic() > deadline:
            file.close()
            if _is_earlier_start(holder, own):
                # SLURM has given it up, with its machine. Some servers never take a lock from a
                # machine that is gone; to a new file the old lock means nothing.
                logger.warning("%s: taking the place of this earlier start of the job", owner)
                path.unlink()
                return lock(folder, wait_seconds)
            raise ValueError(
                f"{owner}: wait for its end, or ask it to stop: touch {folder / 'STOP'}; if it is "
                f"gone with its machine, remove {path}"
            )
        if not is_told:
            logger.warning("%s: this start waits %.0f s for its end", owner, wait_seconds)
            is_told = True
        time.sleep(0.5)
    if reason is not None:
        logger.warning("nothing keeps a second start of this run away: %s", os.strerror(reason))
        return file
    file.truncate(0)
    file.write(f"{own}\n")
    file.flush()
    return file


def _this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    return f"process {os.getpid()} on {platform.node()}" + (
        f", start {start} of job {job}" if job else ""
    )


def _is_earlier_start(holder: str, own: str) -> bool:
    """Whether the holder is an earlier start of the job that this process is of."""
    theirs, ours = (re.search(r", start (\d+) of job (\S+)$", name) for name in (holder, own))
    if theirs is None or ours is None or theirs[2] != ours[2]:
        return False
    return int(theirs[1]) < int(ours[1])


def _try(file: IO[str]) -> int | None:
    """Take the lock, in which processes forked from this one have no part; an error's number."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno
    return None


def _revision() -> str | None:
    """The commit of the code, where it is run from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None
