"""Runs that are asked to stop: all ranks agree, save, say so, and go on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.launching import (
    SAVE_EVERY,
    STEPS,
    make_inputs,
    ranks_of,
    started,
    train,
    wait_for_step,
    write_configs,
)
from vqrae_ds.benchmarks.counting import counted
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.evaluation.summary import read_metrics
from vqrae_ds.manifest import find_step_folder, read_manifest
from vqrae_ds.stopping import DONE, PREEMPTED, PREEMPTED_STATUS, STOP, StopRequest, StopVote

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def vote(rank: int, folder: Path) -> None:
    request = StopRequest(folder)
    request.catch_signals()
    votes = StopVote(request, rank, CPU)
    assert not votes.at_once()

    with counted("cpu") as calls:
        mean_2 = votes.mean_over_ranks(torch.tensor([1.0 + rank, 10.0 * rank]))
        assert not votes.count()
    assert mean_2.tolist() == [2.0, 10.0]
    assert calls.collectives.total() == 1, "the wishes go along with what is reduced anyway"
    with counted("cpu") as calls:
        assert not votes.count()
    assert calls.collectives.total() == 1, "and alone where nothing is"
    assert not calls.waits

    if rank == 1:  # one rank, and it is not the first
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert not votes.count(), "the outcome of the step before"
    assert votes.count()
    assert votes.at_once()
    votes.mean_over_ranks(torch.zeros(2))
    votes.count()
    assert votes.count(), "whichever way the wish took"

    by_file = StopVote(StopRequest(folder), rank, CPU)
    assert not by_file.at_once()
    dist.barrier()
    if rank == 2:
        (folder / STOP).touch()
    dist.barrier()
    assert by_file.at_once()


def test_the_wish_of_one_rank_is_that_of_all(tmp_path):
    run_ranks(3, vote, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lpips_weights) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    make_inputs(folder)
    write_configs(folder, lpips_weights)
    train(folder, 1, f"run.output_dir={folder / 'straight'}")
    assert (folder / "straight" / DONE).exists()
    return folder


def holds_signals(process: psutil.Process) -> bool:
    """Whether SIGTERM waits outside for as long as the process, and those below it, want it to."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.partition("SigBlk:")[2].split()[0], base=16) >> (signal.SIGTERM - 1) & 1)


def ask_by_signals(launcher: subprocess.Popen, _: Path) -> None:
    """As SLURM does it: every process of the rank's, its loader's worker too, and twice."""
    victim = ranks_of(launcher)[-1]
    for process in (victim, *victim.children(recursive=True)):
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
    victim.send_signal(signal.SIGTERM)


def ask_by_file(_: subprocess.Popen, run_folder: Path) -> None:
    (run_folder / STOP).touch()


@pytest.mark.parametrize("ask", [ask_by_signals, ask_by_file])
def test_a_run_that_was_stopped_ends_with_the_same_weights(folder, ask):
    run_folder = folder / ask.__name__
    log_path = folder / f"{ask.__name__}.log"
    with started(folder, 1, f"run.output_dir={run_folder}", log=log_path) as launcher:
        # DeepSpeed's ops are compiled before the first step: no signal is to end a compiler.
        while not any(map(holds_signals, ranks_of(launcher))):
            assert launcher.poll() is None, log_path.read_text()
            assert not (run_folder / "metrics.jsonl").exists(), "a rank got ready unprotected"
            time.sleep(0.1)
        wait_for_step(run_folder, 10, launcher, log_path)
        assert not any(map(holds_signals, ranks_of(launcher)))
        ask(launcher, run_folder)
        status = launcher.wait(timeout=300)
    log = log_path.read_text()
    assert status == PREEMPTED_STATUS, log
    assert "asked to stop after step" in log and "Traceback" not in log, log
    assert (run_folder / PREEMPTED).exists()
    assert not (run_folder / DONE).exists() and not (run_folder / STOP).exists()
    stopped_at = read_manifest(find_step_folder(run_folder)).step
    assert 10 < stopped_at < STEPS and stopped_at % SAVE_EVERY != 0, "a checkpoint of its own"
    assert read_metrics(run_folder)[-1]["step"] == stopped_at

    train(folder, 1, f"run.output_dir={run_folder}")
    assert (run_folder / DONE).exists() and not (run_folder / PREEMPTED).exists()
    for name in ("straight", ask.__name__):
        output = folder / f"{name}_{ask.__name__}_weights"
        consolidate(find_step_folder(folder / name), output, to="stage2")
    ours, straight = (
        load_file(folder / f"{name}_{ask.__name__}_weights" / "model.safetensors")
        for name in (ask.__name__, "straight")
    )
    assert ours.keys() == straight.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, straight[name]), name


def test_a_second_start_waits_for_the_first_and_goes_on_from_it(folder):
    """As after Ctrl-C, or after a `kill` of the launcher, which leaves its ranks to themselves."""
    run_folder = folder / "twice"
    overrides = [f"run.output_dir={run_folder}", "run.total_steps=1000", "data.validation=null"]
    logs = [folder / f"twice_{number}.log" for number in (1, 2)]
    with started(folder, 1, *overrides, log=logs[0]) as first:
        wait_for_step(run_folder, 10, first, logs[0])
        with started(folder, 1, *overrides, log=logs[1]) as second:
            while "this start waits" not in logs[1].read_text():
                assert second.poll() is None, logs[1].read_text()
                time.sleep(0.1)
            ask_by_file(first, run_folder)
            assert first.wait(timeout=300) == PREEMPTED_STATUS, logs[0].read_text()
            stopped_at = read_manifest(find_step_folder(run_folder)).step
            wait_for_step(run_folder, stopped_at + 2, second, logs[1])
            ask_by_file(second, run_folder)
            assert second.wait(timeout=300) == PREEMPTED_STATUS, logs[1].read_text()
    log = logs[1].read_text()
    assert f"{run_folder} is in training by process " in log
    assert f"resumed from {run_folder}/checkpoints/step_{stopped_at:08d} at step" in log
    steps = [e["step"] for e in read_metrics(run_folder) if "loss/total" in e]
    assert steps == list(range(1, steps[-1] + 1))
