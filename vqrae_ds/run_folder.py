"""The run folder explains itself: both files as resolved, and what the run runs on."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import yaml

from vqrae_ds import __version__
from vqrae_ds.config import Run


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


def _revision() -> str | None:
    """The commit of the code, where it is run from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None
