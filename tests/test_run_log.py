"""The records of a run on a disk that is full for a while: what is lost is said.

Where it is full from the start the run does not begin.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.disks import Level, leave, mounted
from tests.tiny import make_run, save_initial, setup_of
from vqrae_ds.evaluation.summary import METRICS_FILE, TENSORBOARD_FOLDER, read_metrics
from vqrae_ds.monitoring.run_log import RunLog
from vqrae_ds.train import TrainingStopped, _begin_records

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


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_run_whose_records_cannot_be_written_does_not_begin(one_rank, tmp_path, steps_before):
    with mounted(tmp_path / "disk") as disk:
        save_initial(tmp_path / "initial")
        run = make_run(tmp_path, 1, world_size=1, run={"output_dir": str(disk)})
        for step in range(1, steps_before + 2):
            RunLog(disk, step=step - 1).write(step, ENTRY)
        leave(disk, Level(inodes=0))
        setup = setup_of(None, None, None)._replace(ranks=SimpleNamespace(rank=0, tensor_size=1))
        setup = setup._replace(state=setup.state._replace(step=steps_before))
        with pytest.raises(TrainingStopped, match="records of the run cannot .*No space left"):
            _begin_records(run, setup)
        assert len(read_metrics(disk)) == steps_before + 1, (disk / METRICS_FILE).read_text()
