"""The whole command with tp 2 x dp 2 against tp 1 x dp 2: data, calibration, logs, validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import make_inputs, train, write_configs
from vqrae_ds.manifest import Layout, find_step_folder, read_manifest

pytestmark = pytest.mark.slow

STEPS, GAN_AFTER = 16, 10
OF_THE_MACHINE = ("perf/", "checkpoint/")


def entries_of(folder: Path, tensor_size: int) -> list[dict[str, float]]:
    """What a run of two data ranks has logged, without what it measured of the machine."""
    run = folder / f"tp{tensor_size}"
    train(
        folder,
        1,
        f"run.output_dir={run}",
        f"run.total_steps={STEPS}",
        "model.decoder.num_heads=4",
        "monitor.validate_every_steps=8",
        "deepspeed.optimizer={type: SGD, params: {lr: 0.05}}",
        f"deepspeed.tensor_parallel.autotp_size={tensor_size}",
        ranks=2 * tensor_size,
    )
    assert read_manifest(find_step_folder(run)).layout == Layout(dp=2, tp=tensor_size)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(OF_THE_MACHINE)}
        for line in lines
    ]


def test_a_run_logs_what_one_without_tensor_parallelism_does(tmp_path, lpips_weights):
    make_inputs(tmp_path)
    write_configs(tmp_path, lpips_weights)
    alone, divided = entries_of(tmp_path, 1), entries_of(tmp_path, 2)
    differences = [line.pop("optim/replica_difference", None) for line in divided]
    assert 0 in differences and not any(differences), "equal sums on the CPU"
    assert len(divided) == len(alone) >= STEPS
    for mine, other in zip(divided, alone, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float | int):
                # The discriminator's leaky ReLUs have a kink, which makes more of rounding.
                bound = 2e-6 if other["step"] <= GAN_AFTER else 2e-3
                assert mine[name] == pytest.approx(value, rel=bound, abs=1e-8), name
            elif name == "codebook/histogram":
                assert mine[name] == value
    names = set().union(*alone)
    assert {"gan/discriminator", "optim/gradient_norm_decoder", "codebook/perplexity"} <= names
    assert any(name.startswith("validation/") for name in names)
