"""Fixtures that several test files share."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-cells",
        action="store_true",
        help="all 72 cells of the exactness matrix, and not only those that pair every two values",
    )


@pytest.fixture(scope="session")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weight file of the perceptual loss: `VQRAE_LPIPS_WEIGHTS`, else one that the tool makes.

    It is kept in `.venv` where there is one, so that it is downloaded once for a machine.
    """
    given = os.environ.get("VQRAE_LPIPS_WEIGHTS")
    if given:
        return Path(given)
    venv = ROOT / ".venv"
    folder = venv if venv.is_dir() else tmp_path_factory.mktemp("lpips")
    path = folder / "lpips_vgg16.safetensors"
    with open(folder / "lpips.lock", "w") as lock:  # one process of pytest-xdist makes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = run_python("tools/make_lpips_weights.py", str(path))
    if made.returncode:
        pytest.skip(f"no weights for LPIPS here: {made.stderr.strip()}")
    return path


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` in the repository, with its package importable."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )


def start_python(*arguments: str, path: Path = ROOT) -> subprocess.Popen[str]:
    """Start `python *arguments` in the repository; modules in `path` come first."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
