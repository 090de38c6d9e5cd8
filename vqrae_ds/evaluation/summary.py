"""A finished run in a few numbers, read from its metrics."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"


class RunSummary(NamedTuple):
    """A run in figures, and the PSNR in dB of each validation image's mean colour."""

    figures: dict[str, float]
    baseline_psnr: float


def summarize_run(folder: Path) -> RunSummary:
    """First and last logged reconstruction term, last validation, and shares of codes in use.

    `codebook_usage_training` is that of the last training steps, `val_codebook_usage` that of the
    last validation's images. Raises `ValueError` where the run has not got that far.
    """
    entries = read_metrics(folder)
    training = [e for e in entries if "loss/reconstruction" in e]
    validations = [e for e in entries if "validation/psnr" in e]
    if not training or not validations or validations[-1]["step"] != training[-1]["step"]:
        raise ValueError(f"{folder} is not a finished run: its metrics lack the last validation")
    last, validation = training[-1], validations[-1]
    figures = {
        "steps": last["step"],
        "first_reconstruction_loss": training[0]["loss/reconstruction"],
        "last_reconstruction_loss": last["loss/reconstruction"],
        "val_psnr": validation["validation/psnr"],
        "val_ssim": validation.get("validation/ssim"),
        "val_lpips": validation.get("validation/lpips"),
        "val_codebook_usage": validation.get("validation/usage"),
        "codebook_usage_training": last["codebook/usage"],
        "teacher_cosine": validation.get("validation/teacher_cosine"),
    }
    known = {name: value for name, value in figures.items() if value is not None}
    return RunSummary(known, validation["validation/baseline_psnr"])


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """All entries of a run's `metrics.jsonl`, in order, without a line that a kill cut short."""
    entries = []
    for line in (run_folder / METRICS_FILE).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries
