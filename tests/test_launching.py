"""What the launch scripts are made of, without a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from argparse import Namespace
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from tests.config_files import write_files
from tests.conftest import ROOT, run_python
from vqrae_ds.launching.guardian import END, REPORT
from vqrae_ds.launching.hosts import Host, read_hostfile, write_hostfile
from vqrae_ds.launching.nodes import Nodes, ssh_options
from vqrae_ds.launching.orders import (
    LAUNCH,
    Orders,
    forwarded,
    read_orders,
    write_deepspeed_env,
    write_orders,
)
from vqrae_ds.launching.processes import end, processes_of
from vqrae_ds.launching.run_folder import RunFolder
from vqrae_ds.stopping import DONE, PREEMPTED, STOP

VALUES = [
    "",
    "plain",
    " a  b ",
    "'",
    '"',
    "$(echo e) `f` $HOME ${x}",
    "\\ \\\\ \\n",
    "! # & ; | < >",
    "ü",
]


def test_hostfile_is_read_and_written(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\n\n  n-1.site slots=8 # first\nme@n2\tslots=4\n")
    hosts = read_hostfile(path)
    assert hosts == [Host("n-1.site", 8), Host("me@n2", 4)]
    write_hostfile(path, hosts)
    assert read_hostfile(path) == hosts


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "names no host"),
        ("# n1 slots=1\n\n", "names no host"),
        ("n1\n", "line 1: 'n1' is not of the form"),
        ("n1 slots=1\nn2 slots=0\n", "line 2: 'n2 slots=0'"),
        ("n1 slots=two", "line 1"),
        ("n[1-2] slots=1", "line 1"),
        ("n1,n2 slots=1", "line 1"),
        ("-oProxyCommand=x slots=1", "line 1"),
        ("n1 slots=1\nn1 slots=2", "line 2: n1 is there twice"),
    ],
)
def test_hostfile_that_means_nothing_is_refused(tmp_path, text, complaint):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match="slots=8|twice") as refused:
        read_hostfile(tmp_path / "hosts")
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_hostfile_launch_refuses_in_one_line_before_anything_is_started(tmp_path, monkeypatch):
    yaml, json = write_files(tmp_path)
    module = ("-m", "vqrae_ds.launching.hostfile")
    monkeypatch.setenv("VQRAE_SILENCE_SECONDS", "60")
    monkeypatch.setenv("VQRAE_GRACE_SECONDS", "one minute")
    done = run_python(*module, str(tmp_path / "hosts"), str(yaml), str(json))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "VQRAE_GRACE_SECONDS = 'one minute'" in done.stderr
    monkeypatch.setenv("VQRAE_GRACE_SECONDS", "0.5")
    done = run_python(*module, str(tmp_path / "hosts"), str(yaml), str(json))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "hosts is not a file" in done.stderr
    (tmp_path / "hosts").write_text("n1 slots=7\nn2 slots=8\n")
    done = run_python(*module, str(tmp_path / "hosts"), str(yaml), str(json))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "train_batch_size = 64" in done.stderr and "15" in done.stderr
    assert not (tmp_path / "out").exists()


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


def test_values_pass_through_deepspeed_and_a_shell(tmp_path):
    values = {f"DS_ACCELERATOR_{i}": value for i, value in enumerate(VALUES)}
    write_deepspeed_env(tmp_path / "env", {**values, "OTHER": "stays"}, PYTHONX="own")
    runner = PDSHRunner(Namespace(user_args=[], user_script=""), "")
    for line in (tmp_path / "env").read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    assert set(runner.exports) == {*values, "PYTHONX"}
    exports = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    arrived = subprocess.run(["bash", "-c", f"{exports} env -0"], capture_output=True, text=True)
    pairs = dict(p.split("=", maxsplit=1) for p in arrived.stdout.split("\0") if "=" in p)
    assert {name: pairs[name] for name in values} == values
    with pytest.raises(ValueError, match="PYTHONX .* more than one line"):
        write_deepspeed_env(tmp_path / "env", {}, PYTHONX="a\nb")


def test_orders_are_for_this_user_alone_and_hold_no_secret(tmp_path):
    environment = {"NCCL_DEBUG": "a\nb", "DS_X": "1", "HOME": "/h", "HF_TOKEN": "t"}
    environment |= {"VQRAE_PASSWORD": "p", "MINE_A": "2", "CUDA_VISIBLE_DEVICES": "3"}
    assert forwarded(environment) == {"NCCL_DEBUG": "a\nb", "DS_X": "1"}
    more = forwarded(environment, "MINE_, HF_TOKEN,CUDA_VISIBLE_DEVICES")
    assert more == {"NCCL_DEBUG": "a\nb", "DS_X": "1", "MINE_A": "2", "HF_TOKEN": "t"}
    orders = Orders("/a b", ["x='y z'", "ü"], more)
    write_orders(tmp_path / "orders", orders)
    assert read_orders(tmp_path / "orders") == orders
    assert (tmp_path / "orders").stat().st_mode & 0o777 == 0o600


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


def test_a_signal_that_was_held_by_the_launcher_is_noted_in_the_end(tmp_path):
    code = """
import os, signal, subprocess, sys
from pathlib import Path
from vqrae_ds.stopping import SIGNALS, StopRequest, hold_signals
if sys.argv[1] == "launcher":
    hold_signals()
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], "rank", ""])
for number in SIGNALS:
    os.kill(os.getpid(), number)
request = StopRequest(Path("."))
assert not request.is_made(look_for_file=False)
compiler = subprocess.Popen(["sleep", "0.5"])
for number in SIGNALS:
    compiler.send_signal(number)
assert compiler.wait() == 0, "what is started meanwhile is not ended"
request.catch_signals()
assert request.is_made(look_for_file=False)
request.signal = None
os.kill(os.getpid(), signal.SIGTERM)
assert request.signal == signal.SIGTERM
"""
    done = run_python("-c", code, "launcher", code)
    assert done.returncode == 0, done.stderr


def test_markers_of_an_earlier_start_are_gone_and_a_signal_becomes_a_file(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open()
    assert folder.marker() is None
    (folder.path / PREEMPTED).touch()
    assert folder.marker() == PREEMPTED
    (folder.path / DONE).touch()
    assert folder.marker() == DONE
    (folder.path / STOP).touch()
    folder.open()
    assert folder.marker() is None and not (folder.path / STOP).exists()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    try:
        folder.turn_signals_into_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (folder.path / STOP).exists() and folder.times_asked == 1
        folder.open()
        assert (folder.path / STOP).exists(), "a signal that came before is not forgotten"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "script", sorted(Path(ROOT / "launchers").glob("*.s*")), ids=lambda p: p.name
)
def test_scripts_are_sound_to_bash(script):
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr
