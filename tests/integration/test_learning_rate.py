"""The learning rate of every step against the schedule's formula, fresh and resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.tiny import GAN, images_of, make_rank_folders, make_run, setup_of
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run
from vqrae_ds.sharding import parameter_groups

pytestmark = pytest.mark.slow

TOTAL, WARMUP, FIRST_OF_DISCRIMINATOR, SAVED_AFTER = 12, 4, 3, 6
BASE, MIN_RATIO, END_RATIO = 0.02, 0.1, 0.25
MULTIPLIERS = {"encoder": 0.5, "quantizer": 2.0, "decoder": 1.0, "discriminator": 3.0}
SCHEDULER = {
    "warmup_num_steps": WARMUP,
    "warmup_min_ratio": MIN_RATIO,
    "cos_min_ratio": END_RATIO,
}
LOSSES = {
    "perceptual": None,
    "adversarial": {"weight": 0.1, "start_step": FIRST_OF_DISCRIMINATOR, **GAN},
}


def ratio(step: int, total: int, kind: str) -> float:
    """Warm-up to 1 at step WARMUP - 1 (log) or WARMUP (linear), cosine to the last step."""
    if step < WARMUP:
        gamma = step / WARMUP if kind == "linear" else math.log(step + 1) / math.log(WARMUP)
        return MIN_RATIO + (1 - MIN_RATIO) * gamma
    progress = (step - WARMUP + 1) / (total - WARMUP)
    return END_RATIO + (1 - END_RATIO) * (1 + math.cos(math.pi * progress)) / 2


def expected(step: int, kind: str) -> dict[str, float]:
    """Rates of the parts at `step` of the run; the discriminator's begin with its first step."""
    rates = {part: BASE * MULTIPLIERS[part] * ratio(step, TOTAL, kind) for part in MULTIPLIERS}
    own = max(step - FIRST_OF_DISCRIMINATOR, 0)
    gan_ratio = ratio(own, TOTAL - FIRST_OF_DISCRIMINATOR, kind)
    return rates | {"discriminator": BASE * MULTIPLIERS["discriminator"] * gan_ratio}


def scheduled_run(folder: Path, kind: str) -> Run:
    return make_run(
        folder,
        2,
        losses=LOSSES,
        run={"total_steps": TOTAL, "output_dir": str(folder.parent / kind)},
        lr_multiplier=MULTIPLIERS,
        deepspeed={
            "optimizer": {"type": "SGD", "params": {"lr": BASE}},
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {**SCHEDULER, "warmup_type": kind},
            },
            "train_micro_batch_size_per_gpu": 1,
        },
    )


def take_steps(generator, discriminator, run: Run, rank: int, steps: range, kind: str) -> None:
    """The trainer's steps; the rates that the optimizers really used are compared at each."""
    from vqrae_ds import engines
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.train import micro_step

    objective = Objective(
        run.config.losses, None, None, discriminator.module, engines.mean_over_ranks
    )
    setup = setup_of(generator, discriminator, objective)
    used: dict[str, float] = {}
    for engine in (generator, discriminator):
        record_rates(engine, used)
    for step in steps:
        want = expected(step, kind)
        assert parameter_groups.learning_rates(generator, discriminator) == pytest.approx(want), (
            step
        )
        used.clear()
        for micro in range(run.schedule.batch.accumulation):
            images = images_of(10 * step + micro, rank, 1)
            micro_step(setup, images, step)
        if step < FIRST_OF_DISCRIMINATOR:
            del want["discriminator"]
        assert used == pytest.approx(want), step


def record_rates(engine, used: dict[str, float]) -> None:
    """`used` gets the rates of each step, by part."""
    optimizer, take_step = engine.optimizer, engine.optimizer.step

    def step(*arguments, **options):
        for group in optimizer.optimizer.param_groups:
            used[group.get("part", "discriminator")] = group["lr"]
        return take_step(*arguments, **options)

    optimizer.step = step


def run_schedules(rank: int, folder: Path) -> None:
    from vqrae_ds import checkpoint, engines
    from vqrae_ds.preparation import set_learning_rates

    for kind in ("linear", "log"):
        run = scheduled_run(folder / f"rank{rank}", kind)
        generator, discriminator = engines.build_generator(run), engines.build_discriminator(run)
        take_steps(generator, discriminator, run, rank, range(SAVED_AFTER), kind)
        saved = checkpoint.save(
            run, checkpoint.Content(generator, discriminator, TrainState(SAVED_AFTER))
        )
        take_steps(generator, discriminator, run, rank, range(SAVED_AFTER, TOTAL), kind)
        last = {part: BASE * factor * END_RATIO for part, factor in MULTIPLIERS.items()}
        assert parameter_groups.learning_rates(generator, discriminator) == pytest.approx(last)

        generator = engines.build_generator(run, fill=False)
        discriminator = engines.build_discriminator(run, fill=False)
        checkpoint.resume(saved, generator, discriminator)
        set_learning_rates(generator, discriminator, run.config.losses, SAVED_AFTER)
        take_steps(generator, discriminator, run, rank, range(SAVED_AFTER, TOTAL), kind)

        for step in (1, SAVED_AFTER):  # as after a step that was not taken
            set_learning_rates(generator, discriminator, run.config.losses, step)
            rates = parameter_groups.learning_rates(generator, discriminator)
            assert rates == pytest.approx(expected(step, kind))

    run = make_run(folder / f"rank{rank}", 2, losses=LOSSES)
    generator = engines.build_generator(run)
    parameter_groups.set_learning_rate(generator, 5)
    assert set(parameter_groups.learning_rates(generator, None).values()) == {0.05}, (
        "without a schedule"
    )


def test_every_step_has_the_rate_of_the_formula(tmp_path: Path) -> None:
    make_rank_folders(tmp_path, 2)
    run_ranks(2, run_schedules, tmp_path)
    assert ratio(TOTAL - 1, TOTAL, "linear") == END_RATIO
