"""Faults that are really there on one node of a small cluster, and are gone afterwards.

Files are changed in an overlay that only the node's mount namespace sees.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.cluster import CONTROLLER, MiniCluster, wait_until

# A file server that hangs: a FUSE file system whose requests nobody answers.
_HANG = """
import ctypes, os, sys, time
device = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"hanging", sys.argv[1].encode(), b"fuse", 0, options):
    sys.exit(os.strerror(ctypes.get_errno()))
print("mounted", flush=True)
time.sleep(1000)
"""
_LISTEN = """
import socket, sys, time
listener = socket.create_server(("", int(sys.argv[1])))
print("listening", flush=True)
time.sleep(1000)
"""


@contextlib.contextmanager
def overlaid(cluster: MiniCluster, node: str, folder: Path, change: str) -> Iterator[None]:
    """The shell commands `change` are done in `folder`, which looks so on this node alone."""
    inside = shlex.quote(str(folder))
    shell(
        cluster,
        node,
        f"mkdir -p /run/overlay && mount -t tmpfs none /run/overlay && cd /run/overlay && "
        f"mkdir upper work && mount -t overlay overlay "
        f"-o lowerdir={inside},upperdir=/run/overlay/upper,workdir=/run/overlay/work {inside} && "
        f"cd {inside} && {change}",
    )
    try:
        yield
    finally:
        shell(cluster, node, f"umount -l {inside}; umount -l /run/overlay")


@contextlib.contextmanager
def mounted(cluster: MiniCluster, node: str, folder: Path, mount: str) -> Iterator[None]:
    """The shell commands `mount` mount something on `folder` of this node."""
    shell(cluster, node, mount)
    try:
        yield
    finally:
        shell(cluster, node, f"umount -l {shlex.quote(str(folder))}")


@contextlib.contextmanager
def hanging(cluster: MiniCluster, node: str, folder: Path) -> Iterator[None]:
    """Whoever looks into `folder` on this node waits for ever."""
    try:
        with _running(cluster, node, _HANG, str(folder)):
            yield
    finally:
        shell(cluster, node, f"umount -l {shlex.quote(str(folder))}")


@contextlib.contextmanager
def listening(cluster: MiniCluster, node: str, port: int) -> Iterator[None]:
    """A process on the node listens on the port."""
    with _running(cluster, node, _LISTEN, str(port)):
        yield


@contextlib.contextmanager
def cut_off(cluster: MiniCluster, node: str) -> Iterator[None]:
    """The node does not answer."""
    cluster.cut_off(node)
    try:
        yield
    finally:
        cluster.reconnect(node)


@contextlib.contextmanager
def ssh_settings(cluster: MiniCluster, settings: str) -> Iterator[None]:
    """`settings` come before what else the ssh of `ctl` is configured to."""
    config = f"{pwd.getpwuid(os.getuid()).pw_dir}/.ssh/config"  # as ssh finds it
    before = cluster.ask(CONTROLLER, "cat", config)
    _write(cluster, config, f"{settings}\n{before}")
    try:
        yield
    finally:
        _write(cluster, config, before)


def shell(cluster: MiniCluster, node: str, script: str) -> str:
    """Run a script on a node; its output."""
    return cluster.ask(node, "bash", "-c", script)


def _write(cluster: MiniCluster, path: str, text: str) -> None:
    shell(cluster, CONTROLLER, f"printf %s {shlex.quote(text)} > {shlex.quote(path)}")


@contextlib.contextmanager
def _running(cluster: MiniCluster, node: str, program: str, argument: str) -> Iterator[None]:
    """A Python program on a node, from its first line of output on."""
    log = cluster.folder / "log" / "fault.out"
    with open(log, "w") as output:
        command = [sys.executable, "-c", program, argument]
        process = cluster.start(node, command, stdout=output, stderr=output)
    try:
        wait_until("the fault", 120, lambda: log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        for pid in cluster.processes(node, argument):
            cluster.run(node, "kill", "-9", str(pid))
        process.wait(10)
