"""The records of a run: `metrics.jsonl` and TensorBoard, which hold the same numbers."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vqrae_ds.evaluation.summary import METRICS_FILE, TENSORBOARD_FOLDER, read_metrics

logger = logging.getLogger(__name__)

Entry = Mapping[str, float | Sequence[int]]


class RunLog:
    """Writes into the run folder; one rank has one.

    What an earlier start wrote after `step` is dropped: those steps come again. An entry that
    cannot be written, on a full disk for example, is lost with a warning: it is no reason for a run
    to end.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / METRICS_FILE
        self._tensorboard = str(folder / TENSORBOARD_FOLDER)
        drop_entries_after(folder, step)
        self._writer: SummaryWriter | None = SummaryWriter(self._tensorboard, purge_step=step + 1)

    def write(self, step: int, entry: Entry) -> None:
        """Write the figures of a step: numbers become curves, lists of counts become histograms.

        JSON has no word for a number that is not finite, so it is left out.
        """
        known = {k: v for k, v in entry.items() if isinstance(v, Sequence) or math.isfinite(v)}
        with self._losing(step):
            _append(self._path, json.dumps({"step": step, **known}, allow_nan=False) + "\n")
            writer = self._open_writer()
            for name, value in known.items():
                if isinstance(value, Sequence):
                    _write_histogram(writer, name, value, step)
                else:
                    writer.add_scalar(name, value, step)
            writer.flush()

    def write_image(self, name: str, image_3HW: Tensor, step: int) -> None:
        """Show an image in [0, 1] in TensorBoard."""
        with self._losing(step):
            self._open_writer().add_image(name, image_3HW, step)

    def close(self) -> None:
        """Write what is held back."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _open_writer(self) -> SummaryWriter:
        if self._writer is None:
            self._writer = SummaryWriter(self._tensorboard)
        return self._writer

    @contextlib.contextmanager
    def _losing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("the records of step %d are not complete: %s", step, error)
            self.close()  # TensorBoard's writer does not recover: the next entry has another file
            self._writer = None


def _append(path: Path, text: str) -> None:
    """Append all of `text` or nothing."""
    with open(path, "a") as file:
        end = file.tell()
        try:
            file.write(text)
            file.flush()
        except OSError:
            os.truncate(path, end)
            raise


def _write_histogram(writer: SummaryWriter, name: str, counts: Sequence[int], step: int) -> None:
    """Bucket i is drawn around i, from i - 0.5 to i + 0.5."""
    writer.add_histogram_raw(
        name,
        min=-0.5,
        max=len(counts) - 0.5,
        num=sum(counts),
        sum=sum(i * count for i, count in enumerate(counts)),
        sum_squares=sum(i * i * count for i, count in enumerate(counts)),
        bucket_limits=[i + 0.5 for i in range(len(counts))],
        bucket_counts=list(counts),
        global_step=step,
    )


def drop_entries_after(folder: Path, step: int) -> None:
    """Keep the entries of `metrics.jsonl` up to `step`, and make the folder if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / METRICS_FILE
    if not path.is_file():
        return
    kept = [json.dumps(entry) + "\n" for entry in read_metrics(folder) if entry["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")  # a kill in here must not lose the rest
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
