"""The line that a logged step shows on the console."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

LOSSES = {
    "loss/total": "loss",
    "loss/reconstruction": "rec",
    "loss/perceptual": "lpips",
    "gan/discriminator": "D",
    "loss/quantizer": "vq",
    "loss/distillation_quantized": "distil_q",
    "loss/distillation_teacher": "distil_t",
}
SLOW_DATA = 0.05  # share of the time; below it the wait is not worth a word


def log_line(step: int, total_steps: int, entry: Mapping[str, float]) -> str:
    """The main figures of a logged step in one line; those that the entry lacks are left out.

    The columns of two lines stand under each other where both have the same figures.
    """
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    parts += [f"{short} {entry[name]:<8.4g}" for name, short in LOSSES.items() if name in entry]
    if (used := entry.get("codebook/usage")) is not None:
        parts.append(f"used {used:6.1%}")
    if (rate := entry.get("optim/learning_rate_decoder")) is not None:
        parts.append(f"lr {rate:.2e}")
    if (norm := entry.get("optim/gradient_norm_generator")) is not None:
        parts.append(f"norm {norm:<8.3g}")
    if skipped := entry.get("optim/skipped_steps"):
        parts.append(f"{skipped:.0f} skipped")
    if bad := entry.get("data/skipped"):
        parts.append(f"{bad:.0f} bad samples")
    if failed := entry.get("checkpoint/failed_saves"):
        parts.append(f"{failed:.0f} SAVES FAILED")
    return "  ".join([*parts, *_speed(entry), f"{_time_left(step, total_steps, entry)} left"])


def _speed(entry: Mapping[str, float]) -> list[str]:
    parts = [
        f"{entry['perf/images_per_second']:.1f} img/s "
        f"({entry['perf/images_per_second_per_gpu']:.1f} a GPU)",
        f"{entry['perf/tflops_per_gpu']:.3g} TFLOP/s",
    ]
    if (mfu := entry.get("perf/mfu")) is not None:
        parts.append(f"MFU {mfu:.1%}")
    waiting = entry["perf/data_seconds"] / entry["perf/seconds_per_step"]
    if waiting > SLOW_DATA:
        parts.append(f"data {waiting:.0%}")
    return [*parts, f"{entry['perf/peak_memory_gb']:.1f} GB"]


def _time_left(step: int, total_steps: int, entry: Mapping[str, float]) -> timedelta:
    return timedelta(seconds=round((total_steps - step) * entry["perf/seconds_per_step"]))
