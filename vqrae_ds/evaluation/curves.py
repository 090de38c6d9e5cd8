"""The curves of a run, read back from `metrics.jsonl` or from TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vqrae_ds.evaluation.summary import METRICS_FILE, TENSORBOARD_FOLDER, read_metrics


class Curve(NamedTuple):
    """A number over the steps."""

    steps: list[int]
    values: list[float]


class Histogram(NamedTuple):
    """Counts by bucket, as they were last written."""

    step: int
    counts: list[int]


class Curves(NamedTuple):
    """All that a run shows as numbers, by name."""

    curves: dict[str, Curve]
    histograms: dict[str, Histogram]


def read_curves(run_folder: Path) -> Curves:
    """The curves in `metrics.jsonl`. Raises `ValueError` where it is missing or empty."""
    if not (run_folder / METRICS_FILE).is_file():
        raise ValueError(f"{run_folder} is no run folder: it has no {METRICS_FILE}")
    found = Curves({}, {})
    for entry in read_metrics(run_folder):
        step = entry.pop("step")
        for name, value in entry.items():
            if isinstance(value, Sequence):
                found.histograms[name] = Histogram(step, value)
            else:
                _add(found, name, step, value)
    if not found.curves:
        raise ValueError(f"{run_folder / METRICS_FILE} is empty: the run has logged no step yet")
    return found


def read_tensorboard(run_folder: Path) -> Curves:
    """The same from the event files, in the single precision that these keep.

    What an earlier start wrote beyond the step at which the run resumed is left out.
    Raises `ValueError` where they are missing or empty.
    """
    folder = run_folder / TENSORBOARD_FOLDER
    if not folder.is_dir():
        raise ValueError(f"{run_folder} is no run folder: it has no {TENSORBOARD_FOLDER}/")
    # Imported here, for it takes a second that the other reader does not need.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "histograms": 0, "images": 1}
    events = EventAccumulator(str(folder), size_guidance=everything).Reload()
    found = Curves({}, {})
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            _add(found, name, event.step, event.value)
    for name in events.Tags()["histograms"]:
        last = events.Histograms(name)[-1]
        found.histograms[name] = Histogram(last.step, list(map(int, last.histogram_value.bucket)))
    if not found.curves:
        raise ValueError(f"{folder} holds no TensorBoard events of a run")
    return found


def _add(found: Curves, name: str, step: int, value: float) -> None:
    curve = found.curves.setdefault(name, Curve([], []))
    curve.steps.append(step)
    curve.values.append(value)
