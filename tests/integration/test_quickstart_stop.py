"""The quickstart under Ctrl-C and TERM: its ranks save, and it waits for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.launching import environment, wait_for_step
from vqrae_ds.manifest import find_step_folder
from vqrae_ds.stopping import PREEMPTED, STOP

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(),
        reason="the quickstart runs in .venv, and this is another environment",
    ),
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "TERM"])
def test_the_quickstart_waits_for_its_ranks_to_save(tmp_path, lpips_weights, number):
    log_path, run = tmp_path / "log", tmp_path / "out" / "stage1"
    variables = {"OUT": str(tmp_path / "out"), "LPIPS": str(lpips_weights)}
    # An interactive shell lets the script hear Ctrl-C; what started these tests may not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log_path, "w") as log:
        script = subprocess.Popen(
            ["bash", "launchers/quickstart.sh"],
            env=environment() | variables,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    signal.signal(signal.SIGINT, before)
    try:
        wait_for_step(run, 20, script, log_path)
        every = psutil.Process(script.pid).children(recursive=True)
        if number == signal.SIGINT:  # a terminal sends it to all
            os.killpg(script.pid, number)
        else:
            script.send_signal(number)
        status = script.wait(timeout=300)
        alive = [process for process in every if process.is_running()]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()
    said = log_path.read_text()
    assert status == 128 + number, said[-3000:]
    assert not alive, "it does not end before its ranks"
    assert (run / PREEMPTED).exists() and not (run / STOP).exists()
    assert find_step_folder(run) is not None
    assert "Traceback" not in said and said.endswith("== stopped; the same command goes on\n")
