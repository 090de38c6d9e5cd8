"""A trace of some steps of rank 0: where the time goes, operator by operator.

`run.profile_steps: [first, last]` of the YAML. The trace opens in chrome://tracing and in Perfetto
(ui.perfetto.dev); beside it lies a table of the operators that take the most time. No rank waits
for another because of it, but a profiled step is slower than others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from vqrae_ds.config import Run

logger = logging.getLogger(__name__)

FOLDER = "profile"
ROWS = 40  # of the table


class StepProfiler:
    """Traces the steps of the window `run.profile_steps` that this start of the run takes.

    Steps are counted from 1. Outside the window, and on the other ranks, it does nothing.
    """

    def __init__(self, run: Run) -> None:
        window = run.config.run.profile_steps
        self._first, self._last = window or (0, 0)
        self._folder = Path(run.config.run.output_dir) / FOLDER
        self._is_on = window is not None and dist.get_rank() == 0
        self._profile: profile | None = None
        self._traced: list[int] = []
        total = run.schedule.total_steps
        if self._is_on and self._first > total:
            logger.warning(
                "run.profile_steps = %s has no effect: the run has %d steps", window, total
            )

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around step number `step` of the run. The last one of the window writes the files."""
        if not self._is_on or not self._first <= step <= self._last:
            yield
            return
        if self._profile is None:
            self._start()
        with record_function(f"step {step}"):
            yield
        self._traced.append(step)
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Write what was traced, if the run ends inside the window; else there is nothing to do.

        A trace that cannot be written is lost with a warning: it is no reason for a run to end.
        """
        if self._profile is None:
            return
        _synchronize()
        finished, self._profile = self._profile, None
        finished.stop()
        if not self._traced:  # it ended inside the first step
            return
        path = self._folder / f"trace_steps_{self._traced[0]}-{self._traced[-1]}.json.gz"
        try:
            _write(finished, path)
        except OSError as error:
            logger.warning("the trace %s was not written: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        else:
            logger.info("profile: %s", path)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        _synchronize()
        self._profile = profile(activities=activities)
        self._profile.start()


def _write(finished: profile, path: Path) -> None:
    """The trace, and beside it the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    finished.export_chrome_trace(str(path))
    device = "device" if torch.cuda.is_available() else "cpu"
    table = finished.key_averages().table(
        sort_by=f"self_{device}_time_total", row_limit=ROWS, max_name_column_width=80
    )
    path.with_name(path.name.replace(".json.gz", ".txt")).write_text(table + "\n")


def _synchronize() -> None:
    """The device is behind the program: without waiting, its work would fall into other steps."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
