"""Nodes of a hostfile job: the connection to them, and the guardian at its other end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from tests.conftest import ROOT
from vqrae_ds.launching.guardian import END, REPORT
from vqrae_ds.launching.nodes import Nodes, ssh_options
from vqrae_ds.launching.orders import LAUNCH
from vqrae_ds.launching.processes import end, processes_of


@pytest.mark.parametrize("silence", [1.0, 10.0, 60.0, 61.0, 600.0])
def test_ssh_does_not_give_a_node_up_before_the_launcher_does(silence):
    listed = subprocess.run(
        ["ssh", "-G", *ssh_options(silence), "n1"], capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    options = dict(line.split(maxsplit=1) for line in listed.stdout.splitlines() if " " in line)
    alive = int(options["serveraliveinterval"]) * int(options["serveralivecountmax"])
    assert silence < alive <= silence + 30


def test_nodes_that_greet_are_understood_and_kept_waiting_for_the_slowest(tmp_path, monkeypatch):
    """ssh leads to a guardian that writes down what it is told, on n2 after a while."""
    guardian = f"printf 'Hello\\n5 users '; printf '\\n{REPORT}3\\n'"
    script = f'case "$*" in *" n2 "*) who=n2; sleep 2;; *) who=n1;; esac; {guardian}'
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{script}; exec sed -u /{END}/q >{tmp_path}/$who\n")
    (tmp_path / "ssh").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with Nodes(["n1", "n2"], "mark", tmp_path, silence=20) as nodes:
        assert (tmp_path / "n1").read_text().startswith("on\non\n")
        assert [node.processes for node in nodes.all] == [3, 3]
        assert nodes.trouble() is None and nodes.is_any_alive()
    assert (tmp_path / "n2").read_text().endswith("end\n")


def sleeper(**environment: str) -> subprocess.Popen:
    """A process with a child of its own, both with this environment."""
    code = "import subprocess, sys; subprocess.Popen(['sleep', '1003']); sys.stdin.read()"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("reason", ["asked", "connection closed", "silence"])
def test_guardian_ends_what_has_the_mark_and_nothing_else(tmp_path, reason):
    mark = uuid.uuid4().hex
    ours, other = sleeper(**{LAUNCH: mark}), sleeper(**{LAUNCH: mark[:-1]})
    silence = "1" if reason == "silence" else "100"
    command = [sys.executable, "-m", "vqrae_ds.launching.guardian", mark, str(tmp_path), silence]
    watcher = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        while len(processes_of(mark)) < 2:
            time.sleep(0.05)
        assert watcher.poll() is None
        if reason == "asked":
            watcher.stdin.write("on\nend\n")
            watcher.stdin.flush()
        elif reason == "connection closed":
            watcher.stdin.close()
        assert watcher.wait(30) == 0
        reports = [line for line in watcher.stdout.read().splitlines() if line]
        assert reports[-1] == f"{REPORT}0" and all(line.startswith(REPORT) for line in reports)
        assert ours.wait(5) == -signal.SIGKILL and not processes_of(mark)
        assert other.poll() is None and len(processes_of(mark[:-1])) == 2
    finally:
        watcher.kill()
        for name in (mark, mark[:-1]):
            end(name)
        for process in (ours, other, watcher):
            process.wait()
