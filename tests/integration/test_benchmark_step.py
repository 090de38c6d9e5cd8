"""The trainer's loop beside the bare one on real ranks: what a step of it may ask for in addition.

How long it takes is for `tools/benchmark.py`, on a machine that does nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from vqrae_ds.benchmarks.step import CASES, Trainer, measure_step
from vqrae_ds.benchmarks.table import Report
from vqrae_ds.config import Run
from vqrae_ds.preparation import Setup, prepare
from vqrae_ds.train import train

pytestmark = pytest.mark.slow

PAIRS = 2


@pytest.fixture(scope="module")
def report() -> Report:
    return measure_step(Trainer(prepare, train), CASES, PAIRS)


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_one_collective_more_at_most_and_waits_for_nothing(report, case):
    rows = {row.metric: row for row in report.rows}
    found = report.details[case]
    assert rows[f"extra_collectives_{case}"].ours <= 1, found["more_in_ours_a_step"]
    assert rows[f"extra_syncs_{case}"].ours == 0, found["more_in_ours_a_step"]
    assert found["collectives_a_step"]["bare"] > 0, "ZeRO-3 gathers weights in every step"


@pytest.mark.parametrize("case", CASES)
def test_both_loops_were_timed(report, case):
    rows = {row.metric: row for row in report.rows}
    row = rows[f"overhead_{case}"]
    assert row.ours > 0 and row.peer > 0
    assert row.ratio == row.ours / row.peer
    _, median, _ = report.details[case]["quartiles_of_paired_ratios"]
    assert rows[f"overhead_paired_{case}"].ratio == pytest.approx(median, abs=1e-4)
    assert report.details[case]["pairs"] == PAIRS


def prepare_with_a_leak(run: Run) -> Setup:
    """A trainer whose objective asks its peers and its device once more in every step."""
    setup = prepare(run)
    of_the_trainer = setup.objective.generator

    def generator(*args: Any) -> Any:
        dist.all_reduce(torch.zeros(1))
        torch.zeros(1).item()
        return of_the_trainer(*args)

    setup.objective.generator = generator
    return setup


def test_what_is_planted_into_the_trainer_is_found(report):
    leaky = measure_step(Trainer(prepare_with_a_leak, train), ["stage2"], PAIRS)
    clean = {row.metric: row.ours for row in report.rows}
    for metric in ("extra_collectives_stage2", "extra_syncs_stage2"):
        (row,) = (row for row in leaky.rows if row.metric == metric)
        assert row.ours == clean[metric] + 1, metric
    more = leaky.details["stage2"]["more_in_ours_a_step"]
    assert any("test_benchmark_step.py" in call for call in more)
