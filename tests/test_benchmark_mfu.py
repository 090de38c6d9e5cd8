"""The benchmark of the MFU: its depth, its clock, and all of it on a CPU with the tiny recipes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, run_python
from vqrae_ds.benchmarks.mfu import (
    WARM_UP_STEPS,
    Found,
    Options,
    _Measured,
    measure_mfu,
    timed_steps,
)
from vqrae_ds.benchmarks.mfu_runs import Depth, Recipe, choose_depth, read_recipe
from vqrae_ds.benchmarks.step import Trainer
from vqrae_ds.config import Run
from vqrae_ds.monitoring.flops import flops_per_image
from vqrae_ds.planning import GB, RESERVE, peak_bytes, plan
from vqrae_ds.preparation import Setup, prepare
from vqrae_ds.train import train

CONFIGS = ROOT / "ds_configs"
PHOTOS = ROOT / "tests/data/photos/val"
PEAK = 0.1  # TFLOP/s


def recipe_of(folder: str, stage: int, *overrides: str) -> Recipe:
    machine = "cpu" if folder == "tiny" else "zero3"
    files = (f"{folder}/stage{stage}.yaml", f"stage{stage}_{machine}.json")
    return Recipe(*(CONFIGS / file for file in files), overrides)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("given", [Depth(), Depth(2, None), Depth(None, 3)])
def test_as_many_blocks_as_fit(stage: int, given: Depth) -> None:
    recipe, memory = recipe_of("internvit_6b", stage), 22.0
    found = choose_depth(recipe, given, memory)
    deeper = Depth(*(n + 1 if own is None else own for n, own in zip(found, given, strict=True)))
    assert all(own in (None, n) for own, n in zip(given, found, strict=True)), "given ones stay"
    assert given != Depth() or found.encoder == found.decoder
    fits = [
        peak_bytes(plan(read_recipe(recipe, depth)), 1).total + RESERVE <= memory * GB
        for depth in (found, deeper)
    ]
    assert fits == [True, False]


def test_a_depth_is_the_recipes_at_most_and_what_is_given_stays() -> None:
    recipe = recipe_of("tiny", 1)
    assert choose_depth(recipe, Depth(), 1000.0) == Depth(4, 4)
    assert choose_depth(recipe, Depth(2, None), 1000.0) == Depth(2, 4)
    assert choose_depth(recipe, Depth(3, 1), 0.0) == Depth(3, 1)
    with pytest.raises(ValueError, match="do not fit into 3.0 GB: lower"):
        choose_depth(recipe_of("internvit_6b", 2), Depth(), 3.0)


def test_a_step_is_timed_from_its_first_batch_to_the_next_steps() -> None:
    accumulation, steps, waiting, working = 3, 2, 0.02, 0.03
    given: list[int] = []

    def batches() -> Any:
        while True:
            time.sleep(waiting)
            given.append(len(given))
            yield len(given)

    found: list[Found] = []
    with pytest.raises(_Measured):
        for _ in timed_steps(batches(), accumulation, steps, torch.device("cpu"), found):
            time.sleep(working)
    assert len(given) == (WARM_UP_STEPS + steps) * accumulation
    ((step_seconds, data_seconds, peak_memory_gb),) = found
    assert len(step_seconds) == len(data_seconds) == steps and peak_memory_gb > 0
    for whole, data in zip(step_seconds, data_seconds, strict=True):
        assert data >= accumulation * waiting
        assert whole >= data + accumulation * working
        assert whole < 3 * accumulation * (waiting + working)


def check(report: dict[str, Any], stage: int, recipe: Recipe, accumulation: int) -> None:
    """Every figure follows from the seconds of the steps, and from the recipe at that depth."""
    rows = {row["metric"]: row for row in report["rows"]}
    details = report["details"][f"stage{stage}"]
    depth = Depth(details["encoder_blocks"], details["decoder_blocks"])
    run = read_recipe(recipe, depth, [f"deepspeed.train_batch_size={8 * accumulation}"])
    seconds = rows[f"step_seconds_stage{stage}"]["ours"]
    assert min(details["step_seconds"]) <= seconds + 1e-4
    assert seconds <= max(details["step_seconds"]) + 1e-4
    tflops = 8 * accumulation * flops_per_image(run) / seconds / 1e12
    assert rows[f"model_tflops_stage{stage}"]["ours"] == pytest.approx(tflops)
    mfu = rows[f"mfu_stage{stage}"]
    assert (mfu["ours"], mfu["peer"]) == (pytest.approx(tflops / PEAK), 0.55)
    goals = report["details"]["goals"]
    assert goals[f"mfu_stage{stage}"]["is_met"] == (mfu["ours"] >= 0.55)
    planned = rows[f"peak_memory_stage{stage}"]
    assert planned["peer"] == pytest.approx(peak_bytes(plan(run), 1).total / GB)
    assert planned["ours"] > 0.1, "the libraries alone take as much"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options", "depth"),
    [(1, ["--encoder-blocks", "2", "--decoder-blocks", "1"], (2, 1)), (2, [], (4, 4))],
)
def test_the_whole_benchmark_on_a_cpu(
    stage: int,
    options: list[str],
    depth: tuple[int, int],
    tmp_path: Path,
    lpips_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    recipe = recipe_of("tiny", stage, f"losses.perceptual.weights={lpips_weights}")
    work, target = tmp_path / "work", tmp_path / "rows.json"
    work.mkdir()
    files = ["--config", str(recipe.config), "--deepspeed_config", str(recipe.deepspeed_config)]
    small = ["--peak-tflops", str(PEAK), "--steps", "2", "--accumulation", "2", *options]
    places = ["--photos", str(PHOTOS), "--folder", str(work), "--json", str(target)]
    arguments = [*files, *small, *places, *recipe.overrides]
    done = run_python("tools/benchmark.py", "mfu", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(target.read_text())
    details = report["details"][f"stage{stage}"]
    assert (details["encoder_blocks"], details["decoder_blocks"]) == depth
    assert details["attention_of_the_encoder"] == "sdpa"
    assert (details["micro_batch"], details["accumulation"]) == (8, 2)
    check(report, stage, recipe, accumulation=2)
    assert not list(work.iterdir()), "nothing stays"


DELAY = 2.0


def prepare_slowed_down(run: Run) -> Setup:
    """A trainer whose objective takes longer for every micro batch."""
    setup = prepare(run)
    of_the_trainer = setup.objective.generator

    def generator(*arguments: Any) -> Any:
        time.sleep(DELAY)
        return of_the_trainer(*arguments)

    setup.objective.generator = generator
    return setup


@pytest.mark.slow
def test_a_slower_trainer_has_a_smaller_share_of_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    recipe = recipe_of("tiny", 1, "losses.perceptual=null", "losses.adversarial=null")
    options = Options(Depth(1, 1), 2, 2, PEAK, PHOTOS, tmp_path)
    seconds, shares = [], []
    for each in (prepare, prepare_slowed_down):
        report = measure_mfu(Trainer(each, train), [recipe], options)
        rows = {row.metric: row for row in report.rows}
        seconds.append(rows["step_seconds_stage1"].ours)
        shares.append(rows["mfu_stage1"].ours)
    assert seconds[1] > 2 * DELAY > seconds[0]
    assert shares[0] / shares[1] == pytest.approx(seconds[1] / seconds[0])


@pytest.mark.slow
def test_a_peak_that_is_not_known_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    options = Options(Depth(1, 1), 2, 2, None, PHOTOS, None)
    with pytest.raises(ValueError, match="the peak of a CPU .* --peak-tflops gives it"):
        measure_mfu(Trainer(prepare, train), [recipe_of("tiny", 1)], options)
