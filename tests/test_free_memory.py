"""The limit that a control group sets: files as kernels write them, and a group of this kernel."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vqrae_ds.conversion.free_memory import free_memory

V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2_FILES = ("memory.max", "memory.current")
NO_LIMIT_V1 = str((1 << 63) - 4096)
LIMIT = 2_000_000_000
TAKE_AND_ASK = """
import sys
from pathlib import Path
from vqrae_ds.conversion.free_memory import free_memory
Path(sys.argv[1], "cgroup.procs").write_text("0")
before = free_memory()
taken = bytearray(b"1") * 300_000_000
print(before, free_memory())
"""


def write_group(group: Path, names: tuple[str, str], limit: str, usage: int, stat: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / names[0]).write_text(f"{limit}\n")
    (group / names[1]).write_text(f"{usage}\n")
    (group / "memory.stat").write_text(stat)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:    800000 kB\n")
    return tmp_path


def test_a_machine_without_groups(root):
    assert free_memory(root) == 800_000 << 10


def test_the_narrowest_group_above_the_process_counts(root):
    (root / "proc/self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    mount, stat = root / "sys/fs/cgroup", "anon 5\ninactive_file 30\nactive_file 4\nslab 9\n"
    write_group(mount / "slurm/job_7/step_0", V2_FILES, "max", 700, stat)
    write_group(mount / "slurm/job_7", V2_FILES, "1000", 700, stat)
    write_group(mount / "slurm", V2_FILES, "5000", 800, stat)
    assert free_memory(root) == 1000 - 700 + 34
    write_group(mount / "slurm", V2_FILES, "900", 880, stat)
    assert free_memory(root) == 900 - 880 + 34
    write_group(mount / "slurm", V2_FILES, "900", 990, stat)
    assert free_memory(root) == 0


def test_groups_of_the_first_version(root):
    lines = "9:name=systemd:/job\n5:cpuset,memory:/job\n0::/\n"
    (root / "proc/self/cgroup").write_text(lines)
    mount = root / "sys/fs/cgroup/memory"
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 30\ntotal_active_file 4\n"
    write_group(mount / "job", V1_FILES, "1000", 700, stat)
    write_group(mount, V1_FILES, NO_LIMIT_V1, 10_000, stat)
    assert free_memory(root) == 1000 - 700 + 34


def test_a_container_sees_its_own_group_as_the_mount(root):
    (root / "proc/self/cgroup").write_text("4:memory:/docker/on/the/host\n")
    write_group(root / "sys/fs/cgroup/memory", V1_FILES, "1000", 700, "total_active_file 4\n")
    assert free_memory(root) == 1000 - 700 + 4


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A group that takes no more than `LIMIT`."""
    for mount, names in (("memory", V1_FILES), ("", V2_FILES)):
        group = Path("/sys/fs/cgroup", mount, f"vqrae_test_{os.getpid()}")
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                (group / names[0]).write_text(str(LIMIT))
                yield group
                return
            finally:
                group.rmdir()
    pytest.skip("no control group with a limit can be made here")


def test_what_a_process_in_a_group_takes_is_no_longer_free(real_group):
    command = [sys.executable, "-c", TAKE_AND_ASK, str(real_group)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before <= LIMIT and before - after == pytest.approx(300_000_000, rel=0.2)
