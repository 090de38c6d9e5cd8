"""The doctor on a real cluster: a sound one, and one fault after the other, each really there."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cluster import faults
from tests.cluster.cluster import CONTROLLER, MiniCluster, wait_until
from tests.cluster.faults import mounted, overlaid, shell
from tests.config_files import write_files
from tests.conftest import ROOT
from vqrae_ds.data.index import find_images, write_shards

pytestmark = pytest.mark.slow

PACKAGES = Path(sysconfig.get_path("purelib"))
PORT = 23456
SECONDS = 10.0  # in which every fault must be named


class Place(NamedTuple):
    """A cluster, and a run that was prepared for it."""

    cluster: MiniCluster
    folder: Path

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "one"

    @property
    def data(self) -> Path:
        return self.folder / "shards"


class Diagnosis(NamedTuple):
    """How the doctor ended; `seconds` are the whole process's."""

    status: int
    output: str
    errors: str
    seconds: float


class Fault(NamedTuple):
    """`plant(place)` is a context; `line` is a pattern of the line that must name it."""

    name: str
    plant: Callable[[Place], Any]
    line: str
    environment: dict[str, str] = {}


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


def in_packages(change: str) -> Callable[[Place], Any]:
    """`change` is done in n2's view of the installed packages."""
    return lambda place: overlaid(place.cluster, "n2", PACKAGES, change)


def on_run_folder(mount: str) -> Callable[[Place], Any]:
    """`mount` mounts something on n2's view of the run's folder, `$F`."""

    def plant(place: Place) -> Any:
        script = f"F={shlex.quote(str(place.run_folder))}; {mount}"
        return mounted(place.cluster, "n2", place.run_folder, script)

    return plant


def other_host_key(place: Place) -> Any:
    """n2 is known here with the key of another machine."""
    public = new_key(place).with_suffix(".pub").read_text()
    (place.folder / "known").write_text(f"n2 {public}")
    strict = f"StrictHostKeyChecking yes\nUserKnownHostsFile {place.folder}/known"
    return faults.ssh_settings(place.cluster, f"Host n2\n{strict}")


def unknown_host_key(place: Place) -> Any:
    strict = "StrictHostKeyChecking ask\nUserKnownHostsFile /dev/null"
    return faults.ssh_settings(place.cluster, f"Host n2\n{strict}")


def refused_key(place: Place) -> Any:
    """n2 does not know this key."""
    settings = f"IdentityFile {new_key(place)}\nIdentitiesOnly yes\nUser nobody"
    return faults.ssh_settings(place.cluster, f"Host n2\n{settings}")


def new_key(place: Place) -> Path:
    """A key that nobody knows; the public half is beside it."""
    path = place.folder / f"key{time.monotonic_ns()}"
    place.cluster.ask(CONTROLLER, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)
    return path


@contextlib.contextmanager
def no_shard(place: Place):
    shard = place.data / "000001.tar"
    kept = shard.rename(place.folder / "kept.tar")
    try:
        yield
    finally:
        kept.rename(shard)


@contextlib.contextmanager
def short_shard(place: Place):
    shard = place.data / "000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    try:
        yield
    finally:
        shard.write_bytes(whole)


@contextlib.contextmanager
def wrong_slots(place: Place):
    """Both nodes have two GPUs by what `nvidia-smi -L` prints, and n2 is to have six ranks."""
    printed = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i})\n" for i in range(2))
    tool = f"printf '#!/bin/sh\\ncat <<E\\n%sE\\n' {shlex.quote(printed)} > nvidia-smi"
    change = f"{tool}; chmod +x nvidia-smi"
    hosts = place.folder / "hosts"
    before = hosts.read_text()
    hosts.write_text("n1 slots=2\nn2 slots=6\n")
    folder = Path("/usr/local/bin")
    with (
        overlaid(place.cluster, "n1", folder, change),
        overlaid(place.cluster, "n2", folder, change),
    ):
        yield
    hosts.write_text(before)


FAULTS = [
    Fault("dead host", lambda p: faults.cut_off(p.cluster, "n2"), "n2  reachable: dead or cut off"),
    Fault("wrong host key", other_host_key, "n2  reachable: its host key is another"),
    Fault("unknown host key", unknown_host_key, "n2  reachable: its host key is not known"),
    Fault("refused key", refused_key, "n2  reachable: it refuses our key"),
    Fault(
        "other torch version",
        in_packages("sed -i 's/^Version: .*/Version: 2.1.0/' torch-*.dist-info/METADATA"),
        r"n2  packages: torch 2\.1\.0, but [\d.+a-z]+ on n1",
    ),
    Fault(
        "missing package",
        in_packages("rm -r transformers-*.dist-info"),
        "n2  packages: transformers is not installed",
    ),
    Fault(
        "other code revision",
        lambda p: overlaid(p.cluster, "n2", ROOT / "vqrae_ds", "echo '# newer' >> train.py"),
        "n2  code: .*/vqrae_ds is another revision than on n1",
    ),
    Fault(
        "no code",
        lambda p: overlaid(
            p.cluster, "n2", ROOT, f"rm -r vqrae_ds {PACKAGES}/__editable__*vqrae_ds* || :"
        ),
        "n2  code: vqrae_ds cannot be imported|n2  code: .* is another revision",
    ),
    Fault(
        "other configuration",
        lambda p: overlaid(p.cluster, "n2", p.folder, "echo '# other' >> config.yaml"),
        r"n2  config: .*config\.yaml differs from the one on n1",
    ),
    Fault(
        "port taken",
        lambda p: faults.listening(p.cluster, "n1", PORT),
        f"n1  port: port {PORT} is taken",
    ),
    Fault(
        "full disk",
        on_run_folder("mount -t tmpfs -o size=64k none $F; dd if=/dev/zero of=$F/x bs=1k || :"),
        "n2  folder: .*/runs/one: No space left on device",
    ),
    Fault(
        "disk too small",
        on_run_folder("mount -t tmpfs -o size=1m none $F"),
        r"n2  disk: .* free in .*, but 4 more checkpoints of .* are to come",
    ),
    Fault(
        "read-only folder",
        on_run_folder("mount --bind $F $F; mount -o remount,bind,ro $F"),
        "n2  folder: .*Read-only file system",
    ),
    Fault(
        "folder that is not shared",
        on_run_folder("mount -t tmpfs none $F"),
        "n2  shared: .* is not the folder that n1 has under this name",
    ),
    Fault("missing shard", no_shard, r"n1, n2  data: .*000001\.tar is missing"),
    Fault("short shard", short_shard, r"n1, n2  data: .*000001\.tar has \d+ bytes, the index says"),
    Fault(
        "missing weights",
        lambda p: overlaid(p.cluster, "n2", p.folder, "rm lpips.safetensors"),
        r"n2  weights: losses\.perceptual\.weights: .*lpips\.safetensors is not there",
    ),
    Fault(
        "clock off",
        in_packages(
            'echo \'import time; time.now = getattr(time, "now", time.time); '
            "time.time = lambda now=time.now: now() + 30' > off.pth"
        ),
        r"n2  clock: its clock is (29\.\d|30\.\d) s ahead of that of n1",
    ),
    Fault("wrong slots", wrong_slots, "n2  gpus: 6 slots, but 2 GPUs", {"DS_ACCELERATOR": ""}),
    Fault(
        "no Python",
        lambda p: overlaid(
            p.cluster, "n2", Path(sys.executable).parent, f"rm {Path(sys.executable).name}"
        ),
        f"n2  reachable: has no {sys.executable} that runs",
    ),
    Fault(
        "file server that hangs",
        lambda p: faults.hanging(p.cluster, "n2", p.data),
        r"n2  data: no answer within [\d.]+ s: a file server",
    ),
]


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
            wait_until("the allocation", 30, ready.exists)
            with fault:
                begin.touch()
                output, errors = job.communicate(timeout=60)
        assert job.returncode == status, output + errors
        assert re.search(line, output, re.MULTILINE), output + errors
        assert float(re.search(r"real\s0m([\d.]+)s", errors)[1]) < SECONDS, errors
