"""The records of a run on a disk that is full for a while: what is lost is said."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.disks import Level, leave, mounted
from vqrae_ds.evaluation.summary import TENSORBOARD_FOLDER
from vqrae_ds.monitoring.run_log import RunLog

ENTRY = {f"loss/part_{number:03d}": number / 7 for number in range(300)}  # more than a page
FULL_AT = range(3, 6)


# TensorBoard writes in a thread, whose end by an error is shown, and then raised in ours.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_entries_and_not_the_run(tmp_path, caplog):
    with mounted(tmp_path / "disk") as disk:
        log = RunLog(disk, step=0)
        for step in range(1, 9):
            leave(disk, Level(num_bytes=0) if step in FULL_AT else Level())
            log.write(step, ENTRY)
        log.close()
        lines = (disk / "metrics.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        assert [entry.pop("step") for entry in kept] == [1, 2, 6, 7, 8]
        assert kept == [ENTRY] * 5
        events = [
            EventAccumulator(str(file)).Reload().Scalars("loss/part_001")
            for file in (disk / TENSORBOARD_FOLDER).iterdir()
            if file.stat().st_size > 1000
        ]
        assert {event.step for each in events for event in each} == {1, 2, 6, 7, 8}
        for step in FULL_AT:
            assert f"the records of step {step} are not complete: [Errno 28]" in caplog.text
