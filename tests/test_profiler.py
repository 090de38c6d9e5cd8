"""A trace of real steps of a small model."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from tests.limits import small_files_only
from tests.tiny import build_model, images_of, make_run, save_initial
from vqrae_ds.config import Run
from vqrae_ds.monitoring.profiler import FOLDER, StepProfiler


@pytest.fixture
def run(tmp_path, one_rank):
    save_initial(tmp_path / "initial")
    return make_run(tmp_path, 1, world_size=1, run={"total_steps": 10, "profile_steps": [2, 3]})


def train(profiler: StepProfiler, steps: range) -> None:
    """The numbered steps of a training loop."""
    model = build_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in steps:
        with profiler.step(step):
            output, images = model(images_of(step, 0)), images_of(step, 0)
            loss = torch.nn.functional.mse_loss(output.reconstruction, images) + output.vq_loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def folder_of(run: Run) -> Path:
    return Path(run.config.run.output_dir) / FOLDER


def traced(run: Run) -> list[str]:
    """Names of the files in the run's profile folder."""
    return sorted(path.name for path in folder_of(run).glob("*"))


def names_in(path: Path) -> list[str]:
    """Names of all events of a trace."""
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"]]


def test_a_window_of_two_steps(run):
    profiler = StepProfiler(run)
    train(profiler, range(1, 6))
    assert traced(run) == ["trace_steps_2-3.json.gz", "trace_steps_2-3.txt"]
    names = names_in(folder_of(run) / "trace_steps_2-3.json.gz")
    assert [name for name in names if name.startswith("step ")] == ["step 2", "step 3"]
    assert {"aten::addmm", "aten::convolution", "aten::mse_loss_backward"} <= set(names)
    optimizer_steps = [name for name in names if name.startswith("Optimizer.step")]
    assert len(optimizer_steps) == 2, "no other step is in it"
    table = (folder_of(run) / "trace_steps_2-3.txt").read_text()
    assert "aten::addmm" in table and "Self CPU" in table


def test_a_run_that_resumes_after_the_window_writes_nothing(run):
    profiler = StepProfiler(run)
    train(profiler, range(4, 6))
    profiler.close()
    assert traced(run) == []


def test_a_run_that_starts_or_ends_inside_the_window_traces_what_it_takes(run):
    train(StepProfiler(run), range(3, 5))
    assert traced(run) == ["trace_steps_3-3.json.gz", "trace_steps_3-3.txt"]
    profiler = StepProfiler(run)
    train(profiler, range(1, 3))
    assert len(traced(run)) == 2
    profiler.close()
    names = names_in(folder_of(run) / "trace_steps_2-2.json.gz")
    assert [name for name in names if name.startswith("step ")] == ["step 2"]


def test_a_window_after_the_end_is_said_to_have_no_effect(tmp_path, one_rank, caplog):
    save_initial(tmp_path / "initial")
    sections = {"total_steps": 10, "profile_steps": [11, 12]}
    with caplog.at_level(logging.WARNING, "vqrae_ds.monitoring.profiler"):
        StepProfiler(make_run(tmp_path, 1, world_size=1, run=sections))
    assert "no effect: the run has 10 steps" in caplog.text


def test_a_full_disk_costs_the_trace_and_not_the_run(run, caplog):
    profiler = StepProfiler(run)
    with caplog.at_level(logging.WARNING, "vqrae_ds.monitoring.profiler"):
        with small_files_only(0):
            train(profiler, range(1, 6))
            profiler.close()
    assert traced(run) == []
    assert "was not written: " in caplog.text and "File too large" in caplog.text
