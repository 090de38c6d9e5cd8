"""What the launch scripts are made of, without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from tests.config_files import write_files
from tests.conftest import ROOT, run_python
from vqrae_ds.launching.hosts import Host, read_hostfile, write_hostfile
from vqrae_ds.launching.orders import (
    Orders,
    forwarded,
    read_orders,
    write_deepspeed_env,
    write_orders,
)
from vqrae_ds.launching.owner import Owner, this_process
from vqrae_ds.launching.run_folder import RunFolder
from vqrae_ds.stopping import DONE, PREEMPTED, SIGNALS, STOP, StopRequest

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


@pytest.mark.parametrize(
    "script, said",
    [
        ("multinode.sh", "required: HOSTFILE, CONFIG.yaml, DEEPSPEED.json (--help"),
        ("slurm.sbatch", "submit it: sbatch --nodes=N launchers/slurm.sbatch CONFIG.yaml"),
        ("slurm_convert.sbatch", "submit it: sbatch launchers/slurm_convert.sbatch RUN OUT"),
    ],
)
def test_a_script_that_is_called_wrongly_says_how_in_one_line(script, said):
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "PROJECT"))}
    done = subprocess.run(
        ["bash", str(ROOT / "launchers" / script)],
        env={**environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ") and said in done.stderr


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
    folder.open(this_process())
    assert folder.marker() is None
    (folder.path / PREEMPTED).touch()
    assert folder.marker() == PREEMPTED
    (folder.path / DONE).touch()
    assert folder.marker() == DONE
    (folder.path / STOP).touch()
    folder.open(this_process())
    assert folder.marker() is None and not (folder.path / STOP).exists()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    try:
        folder.turn_signals_into_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (folder.path / STOP).exists() and folder.times_asked == 1
        folder.open(this_process())
        assert (folder.path / STOP).exists(), "a signal that came before is not forgotten"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_file_system_that_fails_ends_no_run(tmp_path, caplog):
    request = StopRequest(tmp_path / ("x" * 300))
    with pytest.raises(OSError, match="name too long"):
        os.stat(request.folder / STOP)
    assert not request.is_made(look_for_file=True)
    request.leave_mark(is_done=True)
    assert "will take this run for failed: no DONE: " in caplog.text


def test_a_run_has_one_launch_at_a_time(tmp_path):
    """One that lives is not disturbed; one that was killed, or whose pid is another's, is gone."""
    (tmp_path / "launch").mkdir()
    ours, path = RunFolder(tmp_path), tmp_path / "launch" / "owner.json"
    code = """
import sys
from pathlib import Path
from vqrae_ds.launching.owner import this_process
from vqrae_ds.launching.run_folder import RunFolder
RunFolder(Path(sys.argv[1])).open(this_process())
print("open", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    theirs = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert theirs.stdout.readline() == b"open\n"
        (tmp_path / STOP).touch()
        with pytest.raises(ValueError, match=f"process {theirs.pid} on .* is at work") as refused:
            ours.open(this_process())
        assert "\n" not in str(refused.value) and (tmp_path / STOP).exists()
        (tmp_path / STOP).unlink()
        ours.turn_signals_into_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not (tmp_path / STOP).exists(), "a signal to the second launch is not the first's"
    finally:
        theirs.kill()
        theirs.communicate()
        for number in SIGNALS:
            signal.signal(number, before[number])
    RunFolder(tmp_path).open(this_process())
    reused = this_process()._replace(began="1")
    path.write_text(json.dumps(reused._asdict()))
    RunFolder(tmp_path).open(this_process())
    path.write_text(json.dumps(Owner("no.such.host.invalid", 1, "1")._asdict()))
    with pytest.raises(ValueError, match=f"cannot be asked: if it has ended, remove {path}"):
        RunFolder(tmp_path).open(this_process())


@pytest.mark.parametrize(
    "script", ["slurm.sbatch", "multinode.sh", "doctor", "slurm_convert.sbatch"]
)
def test_the_environment_of_a_site_may_be_sloppy(tmp_path, script):
    """Its last line fails, it reads what is not set: so do modules and conda."""
    site = tmp_path / "site env"
    site.write_text('export FOUND="yes $NOT_SET_BEFORE"\nfalse\n[ -d /nowhere ] && export B=1\n')
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$FOUND" "$PATH" "$@"\n')
    python.chmod(0o700)
    environment = {"PATH": "/usr/bin:/bin", "PROJECT": str(ROOT), "PYTHON": str(python)}
    command = ["bash", ROOT / "launchers" / script, *(f"{tmp_path}/{i}" for i in range(3))]

    def start(env_file: Path) -> subprocess.CompletedProcess[str]:
        env = {**environment, "ENV_FILE": str(env_file)}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    done = start(site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"yes  {python.parent}:/usr/bin:/bin "), done.stdout
    done = start(tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere cannot be read" in done.stderr
    site.write_text("set +e\n")
    python.write_text("#!/bin/sh\nexit 7\n")
    assert start(site).returncode == 7


@pytest.mark.parametrize(
    "script", sorted(Path(ROOT / "launchers").glob("*.s*")), ids=lambda p: p.name
)
def test_scripts_are_sound_to_bash(script):
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr
