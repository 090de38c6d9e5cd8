"""The doctor on a real cluster: a sound one, and one fault after the other, each really there."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from tests.cluster import faults
from tests.cluster.cluster import BUSY_SECONDS, CONTROLLER, MiniCluster, wait_until
from tests.cluster.doctor_faults import FAULTS, PORT, Fault, Place
from tests.cluster.faults import mounted, shell
from tests.config_files import write_files
from tests.conftest import ROOT
from vqrae_ds.data.shard_writing import find_images, write_shards

pytestmark = pytest.mark.slow

SECONDS = 10.0  # in which every fault must be named


class Diagnosis(NamedTuple):
    """How the doctor ended; `seconds` are the whole process's."""

    status: int
    output: str
    errors: str
    seconds: float


@pytest.fixture(scope="module")
def place(cluster: MiniCluster, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(cluster, tmp_path_factory.mktemp("doctor"))
    photographs = ROOT / "tests/data/photos"
    write_shards(find_images(photographs), place.data, samples_per_shard=15, root=photographs)
    (place.folder / "lpips.safetensors").write_bytes(b"its content is not looked at")
    place.run_folder.mkdir(parents=True)
    write_files(
        place.folder,
        f"run.output_dir={place.run_folder}",
        f"data.train={place.data}",
        f"losses.perceptual.weights={place.folder}/lpips.safetensors",
    )
    (place.folder / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    return place


def diagnose(place: Place, *arguments: str, **environment: str) -> Diagnosis:
    """Run the doctor on `ctl`, which is no node of the run."""
    settings = {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", **environment}
    words = [ROOT / "launchers/doctor", "--config", place.folder / "config.yaml"]
    words += ["--deepspeed_config", place.folder / "deepspeed.json", "--master_port", str(PORT)]
    if not {"--slurm", "--hostfile"} & set(arguments):
        words += ["--hostfile", place.folder / "hosts"]
    began = time.monotonic()
    done = place.cluster.run(CONTROLLER, *words, *arguments, env=settings)
    return Diagnosis(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def test_a_sound_cluster(place: Place) -> None:
    found = diagnose(place)
    assert found.status == 0, found
    assert "BROKEN" not in found.output
    rows = [line.split() for line in found.output.splitlines() if re.match(r"n\d ", line)]
    assert [row[0] for row in rows] == ["n1", "n2"]
    assert found.seconds < SECONDS
    assert not list(place.run_folder.iterdir()), "nothing is left in the run's folder"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_fault_is_named(place: Place, fault: Fault) -> None:
    with fault.plant(place):
        found = diagnose(place, **fault.environment)
    assert found.status == 1, found
    named = [line for line in found.output.splitlines() if re.match(fault.line, line)]
    assert len(named) == 1, found.output + found.errors
    assert found.seconds < SECONDS
    findings = [line for line in found.output.splitlines() if re.match(r"n\d\S*.*  [\w-]+: ", line)]
    of_n2 = [line for line in findings if line.startswith("n2 ")]
    assert findings in (of_n2, named), f"nothing else is broken: {findings}"
    print(f"\n{fault.name}: {found.seconds:.1f} s: {named[0]}")


def test_a_missing_hostfile_is_a_mistake(place: Place) -> None:
    found = diagnose(place, "--hostfile", str(place.folder / "nowhere"))
    assert (found.status, found.output) == (2, "")
    assert found.errors.startswith("error: ") and "nowhere is not a file" in found.errors
    assert found.seconds < SECONDS


def test_the_network_is_measured(place: Place) -> None:
    found = diagnose(place, "--bandwidth")
    assert found.status == 0, found
    cells = re.findall(r"([\d.]+) GB/s gloo (\S+)", found.output)
    assert [interface for _, interface in cells] == ["eth0", "eth0"]
    assert all(float(speed) > 0 for speed, _ in cells)


def test_a_network_that_loses_everything_is_named(place: Place) -> None:
    """ssh from ctl works; n2 sends what is for n1 to nobody."""
    address = shell(place.cluster, "n1", "hostname -I").split()[0]
    nobody = f"ip neigh replace {address} lladdr 02:00:00:00:00:fe dev eth0 nud permanent"
    shell(place.cluster, "n2", nobody)
    try:
        found = diagnose(place, "--bandwidth", "--bandwidth-seconds", "25")
    finally:
        shell(place.cluster, "n2", f"ip neigh del {address} dev eth0")
    assert found.status == 1, found
    named = re.findall(r"^n\d.*  all-reduce: .*", found.output, re.MULTILINE)
    assert named, found.output
    print("\n".join(["", *named]))
    assert found.seconds < 60
    assert not place.cluster.processes("n2", "vqrae_ds.launching.all_reduce")


def test_in_an_allocation_of_slurm(place: Place) -> None:
    """Over srun: a sound cluster, a small disk on one node, and a node that is cut off."""
    words = [sys.executable, "-m", "vqrae_ds.launching.doctor", "--slurm"]
    words += ["--config", str(place.folder / "config.yaml")]
    words += ["--deepspeed_config", str(place.folder / "deepspeed.json")]
    ready, begin = place.folder / "ready", place.folder / "begin"
    script = f"touch {ready}; while [ ! -e {begin} ]; do sleep 0.1; done; time {shlex.join(words)}"
    settings = {"DS_ACCELERATOR": "cpu", "RANKS_PER_NODE": "2"}
    small = f"mount -t tmpfs -o size=64k none {place.run_folder}"
    cases = [
        (contextlib.nullcontext(), 0, "^n2 +ok"),
        (mounted(place.cluster, "n2", place.run_folder, small), 1, "^n2  disk: "),
        (faults.cut_off(place.cluster, "n2"), 1, "^n2  reachable: no answer within"),
    ]
    for fault, status, line in cases:
        for path in (ready, begin):
            path.unlink(missing_ok=True)
        command = ["salloc", "--quiet", "-N2", "bash", "-c", script]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with place.cluster.start(CONTROLLER, command, env=settings, **pipes) as job:
            wait_until("the allocation", BUSY_SECONDS, ready.exists)
            with fault:
                begin.touch()
                output, errors = job.communicate(timeout=BUSY_SECONDS)
        assert job.returncode == status, output + errors
        assert re.search(line, output, re.MULTILINE), output + errors
        assert float(re.search(r"real\s0m([\d.]+)s", errors)[1]) < SECONDS, errors
