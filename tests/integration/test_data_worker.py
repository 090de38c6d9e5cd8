"""A process that reads data dies amid a training: the run ends at once, and says so."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.launching import make_inputs, ranks_of, started, wait_for_step, write_configs

pytestmark = pytest.mark.slow

MOST_SECONDS = 60  # until the launcher has ended


def test_the_death_of_a_worker_is_noticed_and_named(tmp_path, lpips_weights):
    make_inputs(tmp_path)
    write_configs(tmp_path, lpips_weights)
    log = tmp_path / "log"
    run = tmp_path / "run"
    overrides = [f"run.output_dir={run}", "run.total_steps=100000", "data.num_workers=2"]
    with started(tmp_path, 1, *overrides, log=log) as launcher:
        wait_for_step(run, 3, launcher, log)
        every = psutil.Process(launcher.pid).children(recursive=True)
        rank = next(p for p in ranks_of(launcher) if p.environ()["RANK"] == "1")
        readers = [p for p in rank.children() if p.cmdline() == rank.cmdline()]
        assert len(readers) == 2
        readers[0].kill()
        began = time.monotonic()
        assert launcher.wait(timeout=MOST_SECONDS) != 0
        _, alive = psutil.wait_procs(every, timeout=10)
        assert not alive, "no process outlives the job"
    said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1, log.read_text()[-3000:]
    assert said[0].startswith("error: rank 1: a process that reads data has died: ")
    assert f"pid {readers[0].pid}" in said[0].replace("(pid(s)", "(pid").replace("(", "")
    assert "Killed" in said[0] and "data.num_workers" in said[0]
    assert time.monotonic() - began < MOST_SECONDS
