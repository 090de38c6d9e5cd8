"""What a run shows: a line with the time left, `metrics.jsonl`, TensorBoard, and image grids.

Between logged steps nothing is reduced and nothing is read back from the device. A logged step has
one fused reduction: the means of all terms since the last one, and how often each code was used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vqrae_ds.config import Run
from vqrae_ds.evaluation.metrics import Validation
from vqrae_ds.evaluation.report import image_grid, save_grid
from vqrae_ds.evaluation.summary import METRICS_FILE
from vqrae_ds.models.quantizer import Quantizer, codebook_statistics

logger = logging.getLogger(__name__)

SHOWN = {
    "loss/total": "loss",
    "loss/reconstruction": "rec",
    "loss/perceptual": "lpips",
    "gan/discriminator": "D",
    "codebook/usage": "usage",
}


class CodeWindow:
    """How often each code was used by this rank over the last steps, those that hold `tokens`.

    The counts of each step are kept, on the device, so that the window ends on the very step.
    """

    def __init__(self, tokens: int, tokens_per_step: int) -> None:
        self._counts_K: deque[Tensor] = deque(maxlen=-(-tokens // tokens_per_step))

    def add_step(self, quantizer: Quantizer) -> None:
        """Take over the counts of one step; those of the oldest fall out at the other end."""
        self._counts_K.append(quantizer.code_counts.clone())
        quantizer.reset_codebook_usage()

    def counts(self) -> Tensor:
        """(K,) float64: how often each code was used in the window."""
        return torch.stack(tuple(self._counts_K)).sum(0).double()


class _Progress(NamedTuple):
    time: float
    step: int


class Monitor:
    """Collects terms on every rank, writes on rank 0.

    What an earlier start logged after `step` is dropped: those steps come again.
    """

    def __init__(self, run: Run, step: int) -> None:
        config = run.config
        self.run, self.folder = run, Path(config.run.output_dir)
        tokens_a_step = run.schedule.batch.global_batch * config.model.grid_side**2
        self.window = CodeWindow(config.monitor.usage_window_tokens, tokens_a_step)
        self._sums: dict[str, Tensor] = {}
        self._numbers: dict[str, int] = {}
        self._last = _Progress(time.monotonic(), step)
        self._paused_seconds = 0.0
        self._writer = None
        if dist.get_rank() == 0:
            _drop_entries_after(self.folder / METRICS_FILE, step)
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the detached terms of one micro batch; they stay on the device."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value
            self._numbers[name] = self._numbers.get(name, 0) + 1

    def log(self, step: int, samples: int, learning_rates: dict[str, float]) -> dict[str, float]:
        """Reduce, reset and write what was added since the last call; every rank calls it."""
        names = sorted(self._sums)
        means = [self._sums[name].double() / self._numbers[name] for name in names]
        fused = torch.cat([torch.stack(means), self.window.counts()])
        dist.all_reduce(fused)
        fused = fused.cpu()
        values, counts_K = fused[: len(names)] / dist.get_world_size(), fused[len(names) :]
        entry = dict(zip(names, values.tolist(), strict=True))
        entry |= {f"codebook/{k}": v for k, v in codebook_statistics(counts_K)._asdict().items()}
        entry |= {f"optim/learning_rate_{part}": rate for part, rate in learning_rates.items()}
        entry |= self._speed(step)
        self._sums.clear()
        self._numbers.clear()
        self._write(step, {"samples": samples, **entry})
        self._show(step, entry)
        return entry

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        start = time.monotonic()
        yield
        self._paused_seconds += time.monotonic() - start

    def log_validation(self, step: int, validation: Validation) -> None:
        """Write the figures and the grid originals | reconstructions."""
        self._write(step, validation.figures)
        if self._writer is not None:
            number = self.run.config.monitor.num_images
            columns = [validation.images_B3HW[:number], validation.images_hat_B3HW[:number]]
            grid_3HW = image_grid(columns)
            self._writer.add_image("validation/reconstructions", grid_3HW, step)
            save_grid(grid_3HW, self.folder / "samples" / f"step_{step:08d}.png")
        figures = "  ".join(f"{k.split('/')[1]} {v:.4g}" for k, v in validation.figures.items())
        logger.info("validation after step %d: %s", step, figures)

    def close(self) -> None:
        """Flush what TensorBoard holds back."""
        if self._writer is not None:
            self._writer.close()

    def _speed(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        steps = step - self._last.step
        seconds = max(now - self._last.time - self._paused_seconds, 1e-9)
        self._last, self._paused_seconds = _Progress(now, step), 0.0
        batch = self.run.schedule.batch
        speed = {
            "perf/seconds_per_step": seconds / max(steps, 1),
            "perf/images_per_second": steps * batch.global_batch / seconds,
        }
        if torch.cuda.is_available():
            speed["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return speed

    def _write(self, step: int, entry: dict[str, float]) -> None:
        if self._writer is None:
            return
        with open(self.folder / METRICS_FILE, "a") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")
        for name, value in entry.items():
            self._writer.add_scalar(name, value, step)

    def _show(self, step: int, entry: dict[str, float]) -> None:
        total = self.run.schedule.total_steps
        left = timedelta(seconds=round((total - step) * entry["perf/seconds_per_step"]))
        shown = "  ".join(f"{short} {entry[k]:.4g}" for k, short in SHOWN.items() if k in entry)
        speed = entry["perf/images_per_second"]
        logger.info("step %d/%d  %s  %.1f img/s  %s left", step, total, shown, speed, left)


def _drop_entries_after(path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the line that a kill cut short
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")  # a kill in here must not lose the rest
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
