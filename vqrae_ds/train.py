"""The entry point and the one training loop, for both stages.

    deepspeed --module vqrae_ds.train --config Y.yaml --deepspeed_config J.json [a.b=value ...]

A step: next batch -> engine forward -> objective -> backward, step -> the discriminator's turn.
What is due after it, in this order: log, validation, checkpoint. The same command again resumes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from vqrae_ds import __version__
from vqrae_ds.command_line import USER_ERRORS, exit_with
from vqrae_ds.config import Run, describe, parse_command_line

if TYPE_CHECKING:
    from torch import Tensor

    from vqrae_ds.checkpoint import TrainState
    from vqrae_ds.data.index import ShardIndex
    from vqrae_ds.data.stream import Batch
    from vqrae_ds.engines import DeepSpeedEngine, Ranks
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.losses.perceptual import PerceptualLoss
    from vqrae_ds.monitor import Monitor

logger = logging.getLogger("vqrae_ds.train")


class Setup(NamedTuple):
    """Everything that the loop works with."""

    ranks: Ranks
    generator: DeepSpeedEngine
    discriminator: DeepSpeedEngine | None
    objective: Objective
    perceptual: PerceptualLoss | None
    batches: Iterator[Batch]
    validation_index: ShardIndex | None
    state: TrainState


def main() -> None:
    """Check, prepare, train. A user's mistake is one line and exit status 2."""
    try:
        run, dry_run = parse_command_line()
    except ValueError as error:  # the same on every rank of a node: one of them says it
        exit_with(error, silent=os.environ.get("LOCAL_RANK", "0") != "0")
    if dry_run:
        sys.stdout.write(describe(run) + "\n")
        return
    _configure_logging(rank=int(os.environ.get("RANK", "0")))
    try:
        setup = prepare(run)
    except USER_ERRORS as error:
        logger.debug("the mistake was found here", exc_info=True)  # VQRAE_LOG_LEVEL=DEBUG shows it
        exit_with(error)
    train(run, setup)


def prepare(run: Run) -> Setup:
    """Read the data's index, build the engines, and load what there is to go on from.

    Raises `ValueError` where something that the run needs is missing or does not fit.
    """
    # Imported here, so that a mistake in the configuration does not wait for torch.
    from vqrae_ds import checkpoint, engines, first_weights
    from vqrae_ds.calibration import calibrate
    from vqrae_ds.data.index import read_index
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.losses.perceptual import PerceptualLoss

    config = run.config
    ranks = engines.start(timedelta(minutes=config.run.collective_timeout_minutes))
    Path(config.run.output_dir).mkdir(parents=True, exist_ok=True)
    index = read_index(Path(config.data.train))
    if config.data.samples_per_epoch not in (None, index.num_samples):
        logger.warning(
            "data.samples_per_epoch is %d, and %s has %d samples: epochs count the former",
            *(config.data.samples_per_epoch, config.data.train, index.num_samples),
        )
    validation = config.data.validation
    validation_index = None if validation is None else read_index(Path(validation))
    perceptual = None
    if config.losses.perceptual is not None:
        weights = config.losses.perceptual.weights
        perceptual = PerceptualLoss(weights and Path(weights)).to(ranks.device)

    # Where to start: a checkpoint of the run, else what the section init says.
    folder = checkpoint.find(run)
    if folder is None:
        run = checkpoint.resolve_start(run)
    generator = engines.build_generator(run, fill=folder is None)
    discriminator = engines.build_discriminator(run, fill=folder is None)
    state = checkpoint.TrainState()
    if folder is not None:
        state = checkpoint.resume(folder, generator, discriminator).state
        first_weights.check_filled(generator.module)
    elif _needs_calibration(run):
        images = _training_batches(run, ranks, index, start=0)
        calibrate(generator, images, config.run.calibration_images, ranks.device)

    objective = Objective(
        config.losses, perceptual, discriminator and discriminator.module, engines.mean_over_ranks
    )
    batches = _training_batches(run, ranks, index, start=state.samples)
    return Setup(
        ranks, generator, discriminator, objective, perceptual, batches, validation_index, state
    )


def train(run: Run, setup: Setup) -> None:
    """The loop: from `setup.state` to the last step."""
    from vqrae_ds import checkpoint, engines
    from vqrae_ds.monitor import Monitor

    config, (sizes, total_steps) = run.config, run.schedule
    generator, discriminator, state = setup.generator, setup.discriminator, setup.state
    if setup.ranks.rank == 0 and state.step < total_steps:
        _record(run)
    monitor = Monitor(run, state.step)
    while state.step < total_steps:
        for _ in range(sizes.accumulation):
            images = next(setup.batches).images_B3HW.to(setup.ranks.device, non_blocking=True)
            terms = micro_step(generator, discriminator, setup.objective, images, state.step)
            monitor.add(terms)
        monitor.window.add_step(generator.module.vqrae.quantizer)
        state = checkpoint.TrainState(state.step + 1, state.samples + sizes.global_batch)

        if is_due(state.step, config.monitor.log_every_steps, total_steps):
            rates = engines.learning_rates(generator, discriminator)
            entry = monitor.log(state.step, state.samples, rates)
            for name in ("loss/total", "gan/discriminator"):
                if not math.isfinite(entry.get(name, 0.0)):  # the same number on every rank
                    raise FloatingPointError(f"{name} is {entry[name]} at step {state.step}")
        with monitor.paused():
            if is_due(state.step, config.monitor.validate_every_steps, total_steps):
                _validate(run, setup, monitor, state.step)
            if is_due(state.step, config.checkpoint.every_steps, total_steps):
                checkpoint.save(run, generator, discriminator, state)
    monitor.close()
    logger.info("done: %d steps, %s", state.step, config.run.output_dir)
    engines.stop()


def micro_step(
    generator: DeepSpeedEngine,
    discriminator: DeepSpeedEngine | None,
    objective: Objective,
    images_B3HW: Tensor,
    step: int,
) -> dict[str, Tensor]:
    """Both backwards of one micro batch; with the last one of a step come the optimizers' steps.

    Returns the terms of the losses, detached.
    """
    from vqrae_ds.losses.objective import discriminator_loss

    loss = objective.generator(generator(images_B3HW), images_B3HW, step)
    generator.backward(loss.surrogate)
    generator.step()
    if not objective.trains_discriminator(step):
        return loss.terms
    verdict = discriminator_loss(discriminator, images_B3HW, loss.images_hat_B3HW)
    discriminator.backward(verdict.total)
    discriminator.step()
    return loss.terms | verdict.terms


def is_due(step: int, every: int, total: int) -> bool:
    """Whether what happens every `every` steps, and after the last one, happens after `step`."""
    return step % every == 0 or step == total


def _needs_calibration(run: Run) -> bool:
    """Weights that were trained before bring the statistics of their features with them."""
    config = run.config
    is_first = config.stage == 1 and not (config.init.model or config.init.from_run)
    return is_first and config.model.standardization == "calibrated"


def _training_batches(run: Run, ranks: Ranks, index: ShardIndex, *, start: int) -> Iterator[Batch]:
    from vqrae_ds.data.decode import Augmentation
    from vqrae_ds.data.stream import training_batches

    data = run.config.data
    return training_batches(
        index,
        image_size=run.config.model.image_size,
        micro_batch_size=run.schedule.batch.micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=run.config.run.seed,
        start=start,
        num_workers=data.num_workers,
        augmentation=Augmentation(
            crop_scale_min=data.crop_scale_min,
            crop_scale_max=data.crop_scale_max,
            horizontal_flip=data.horizontal_flip,
        ),
    )


def _validate(run: Run, setup: Setup, monitor: Monitor, step: int) -> None:
    from vqrae_ds.data.stream import evaluation_batches
    from vqrae_ds.evaluation.metrics import validate

    if setup.validation_index is None:
        return
    batches = evaluation_batches(
        setup.validation_index,
        image_size=run.config.model.image_size,
        batch_size=run.schedule.batch.micro_batch,
        rank=setup.ranks.rank,
        world_size=setup.ranks.world_size,
    )
    validation = validate(setup.generator, batches, setup.perceptual, setup.ranks.device)
    monitor.log_validation(step, validation)


def _configure_logging(rank: int) -> None:
    level = os.environ.get("VQRAE_LOG_LEVEL", "INFO" if rank == 0 else "ERROR")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("vqrae_ds").setLevel(level)


def _record(run: Run) -> None:
    """The run folder explains itself: both files as resolved, and what it runs on."""
    folder = Path(run.config.run.output_dir)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(), sort_keys=False))
    (folder / "deepspeed.json").write_text(json.dumps(run.deepspeed, indent=2) + "\n")
    packages = ("torch", "deepspeed", "transformers", "numpy", "pillow", "webdataset")
    environment = {
        "revision": _revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "ranks": run.schedule.batch.world_size,
        "packages": {"vqrae_ds": __version__} | {name: version(name) for name in packages},
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def _revision() -> str | None:
    """The commit of the code, where it is run from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


if __name__ == "__main__":
    main()
