"""The benchmark of a save on real ranks: what it writes, and that nothing of it stays.

The figures are for `tools/benchmark.py`, on a machine that does nothing else.
"""

from __future__ import annotations

import pytest

from vqrae_ds.benchmarks.checkpoint import measure_checkpoint
from vqrae_ds.preparation import prepare

pytestmark = pytest.mark.slow


def test_each_kind_of_save_was_timed_and_nothing_stays(tmp_path):
    folder, local = tmp_path / "folder", tmp_path / "local"
    folder.mkdir()
    local.mkdir()
    report = measure_checkpoint(prepare, folder, local, rounds=2)
    assert {row.metric for row in report.rows} == {
        "stall_direct",
        "stall_direct_synced",
        "stall_two_steps",
    }
    quartiles = report.details["quartiles_of_seconds"]
    for row in report.rows:
        assert row.ours > 0 and row.peer > 0
        kind = "two_steps" if row.metric == "stall_two_steps" else "direct"
        assert row.ours == pytest.approx(quartiles[kind][1], abs=1e-4)
    # 25 M trained parameters in fp32 with two moments each; as many frozen ones are written once.
    assert 290 < report.details["megabytes"] < 330
    assert report.details["seconds_until_published"] > quartiles["two_steps"][0]
    assert not list(folder.iterdir()) and not list(local.iterdir())
