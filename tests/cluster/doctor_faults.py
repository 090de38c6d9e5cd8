"""What may be wrong with a cluster that a run is to start on, and how the doctor must name it."""

from __future__ import annotations

import contextlib
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.cluster import faults
from tests.cluster.cluster import CONTROLLER, MiniCluster
from tests.cluster.faults import mounted, overlaid
from tests.conftest import ROOT

PACKAGES = Path(sysconfig.get_path("purelib"))
PORT = 23456  # of the master


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


class Fault(NamedTuple):
    """`plant(place)` is a context; `line` is a pattern of the line that must name it."""

    name: str
    plant: Callable[[Place], Any]
    line: str
    environment: dict[str, str] = {}


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
    try:
        with (
            overlaid(place.cluster, "n1", folder, change),
            overlaid(place.cluster, "n2", folder, change),
        ):
            yield
    finally:
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
        r"n2  disk: .* free in .*, but \d more checkpoints of .* are to come",
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
        r"n2  weights: losses\.perceptual\.weights: .*lpips\.safetensors is missing",
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
        r"n2  data: .*/shards: no answer within [\d.]+ s: a file server",
    ),
]
