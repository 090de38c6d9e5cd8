"""What a run shows: a line with the time left, `metrics.jsonl`, TensorBoard, and image grids.

Between logged steps nothing is reduced and nothing is read back from the device. A logged step has
one fused reduction: the sums of all terms since the last one, and how often each code was used.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vqrae_ds.config import Run
from vqrae_ds.evaluation.metrics import Validation
from vqrae_ds.evaluation.report import image_grid, save_grid

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SHOWN = {
    "loss/total": "loss",
    "loss/reconstruction": "rec",
    "loss/perceptual": "lpips",
    "gan/discriminator": "D",
    "codebook/usage": "usage",
}


class CodeWindow:
    """How often each code was used over about the last `tokens` tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self._counts_K = tokens, deque()

    def add(self, counts_K: Tensor) -> None:
        """Add the counts of one interval; whole intervals fall out at the other end."""
        self._counts_K.append(counts_K)
        while sum(c.sum() for c in self._counts_K) - self._counts_K[0].sum() >= self.tokens:
            self._counts_K.popleft()

    def usage(self) -> float:
        """Fraction of codes used in the window, 0..1."""
        return (sum(self._counts_K) > 0).double().mean().item()

    def perplexity(self) -> float:
        """exp of the entropy of the code distribution: the number of codes, were all used alike."""
        p_K = sum(self._counts_K) / sum(self._counts_K).sum()
        return torch.special.entr(p_K).sum().exp().item()


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
        self.window = CodeWindow(config.monitor.usage_window_tokens)
        self._sums: dict[str, Tensor] = {}
        self._numbers: dict[str, int] = {}
        self._last = _Progress(time.monotonic(), step)
        self._writer = None
        if dist.get_rank() == 0:
            _drop_entries_after(self.folder / METRICS_FILE, step)
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the detached terms of one micro batch; they stay on the device."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value
            self._numbers[name] = self._numbers.get(name, 0) + 1

    def log(self, step: int, samples: int, learning_rate: float, simvq: Any) -> dict[str, float]:
        """Reduce, reset and write what was added since the last call; every rank calls it."""
        names = sorted(self._sums)
        means = [self._sums[name].double() / self._numbers[name] for name in names]
        fused = torch.cat([torch.stack(means), simvq.code_counts.double()])
        dist.all_reduce(fused)
        fused = fused.cpu()
        self.window.add(fused[len(names) :])
        entry = dict(
            zip(names, (fused[: len(names)] / dist.get_world_size()).tolist(), strict=True)
        )
        entry |= {
            "codebook/usage": self.window.usage(),
            "codebook/perplexity": self.window.perplexity(),
            "optim/learning_rate": learning_rate,
        } | self._speed(step)
        self._sums.clear()
        self._numbers.clear()
        simvq.reset_codebook_usage()
        self._write(step, {"samples": samples, **entry})
        self._show(step, entry)
        return entry

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
        steps, seconds = step - self._last.step, max(now - self._last.time, 1e-9)
        self._last = _Progress(now, step)
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


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """All entries of a run's `metrics.jsonl`, in order."""
    return [json.loads(line) for line in (run_folder / METRICS_FILE).read_text().splitlines()]


def _drop_entries_after(path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        kept = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that the kill cut short
                continue
            if entry["step"] <= step:
                kept.append(line + "\n")
        path.write_text("".join(kept))
