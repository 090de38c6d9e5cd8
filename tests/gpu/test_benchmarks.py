"""The benchmarks that need a GPU, on one. The goals of time are for a quiet machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from vqrae_ds.benchmarks.kernel import measure_kernel
from vqrae_ds.benchmarks.mfu import Options, measure_mfu
from vqrae_ds.benchmarks.mfu_runs import Depth, Recipe
from vqrae_ds.benchmarks.step import Trainer
from vqrae_ds.preparation import prepare
from vqrae_ds.train import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_kernel_finds_the_codes_without_the_matrix() -> None:
    report = measure_kernel(rounds=5)
    search, beside_matrix, memory, wrong = report.rows
    assert search.ours == beside_matrix.ours > 0
    assert memory.ratio is not None and memory.ratio <= 1
    assert wrong.ours == 0
    matrix = report.details["extra_megabytes"]["matrix"]
    assert matrix >= 2 * 16384 * 16384 / 1e6, "it keeps a value of bf16 for each pair"
    assert set(report.details["goals"]) == {row.metric for row in report.rows[:3]}


def test_the_memory_of_6b_blocks_is_the_planned_one(
    tmp_path: Path, lpips_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    overrides = (f"losses.perceptual.weights={lpips_weights}",)
    configs = ROOT / "ds_configs"
    recipes = [
        Recipe(configs / f"internvit_6b/stage{n}.yaml", configs / f"stage{n}_zero3.json", overrides)
        for n in (1, 2)
    ]
    photos = ROOT / "tests/data/photos/val"
    options = Options(Depth(2, 2), 2, 2, None, photos, tmp_path)
    report = measure_mfu(Trainer(prepare, train), recipes, options)
    rows = {row.metric: row for row in report.rows}
    for stage in ("stage1", "stage2"):
        assert rows[f"peak_memory_{stage}"].ratio == pytest.approx(1, abs=0.07)
        assert 0 < rows[f"mfu_{stage}"].ours < 1
