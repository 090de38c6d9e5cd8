"""The entry point and the one training loop, for both stages.

    deepspeed --module vqrae_ds.train --config Y.yaml --deepspeed_config J.json [a.b=value ...]

A step: next batch -> engine forward -> objective -> backward, step -> the discriminator's turn.
What is due after it, in this order: log, validation, checkpoint. The same command again resumes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from vqrae_ds.config import Run, describe, parse_command_line

if TYPE_CHECKING:
    from vqrae_ds.checkpoint import TrainState
    from vqrae_ds.data.index import ShardIndex
    from vqrae_ds.data.stream import Batch
    from vqrae_ds.engines import DeepSpeedEngine, Ranks
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.losses.perceptual import PerceptualLoss

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
        if dry_run:
            sys.stdout.write(describe(run) + "\n")
            return
        setup = prepare(run)
    except ValueError as error:
        logger.debug("the mistake was found here", exc_info=True)
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}\n")
        sys.exit(2)
    train(run, setup)


def prepare(run: Run) -> Setup:
    """Read the data's index, build the engines, and load what there is to go on from.

    Raises `ValueError` where something that the run needs is missing or does not fit.
    """
    # Imported here, so that a mistake in the configuration does not wait for torch.
    from vqrae_ds import checkpoint, engines
    from vqrae_ds.calibration import calibrate
    from vqrae_ds.data.index import read_index
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.losses.perceptual import PerceptualLoss

    config = run.config
    ranks = engines.start(timedelta(minutes=config.run.collective_timeout_minutes))
    _configure_logging(ranks.rank)
    index = read_index(Path(config.data.train))
    validation = config.data.validation
    validation_index = None if validation is None else read_index(Path(validation))
    perceptual = None
    if config.losses.perceptual is not None:
        weights = config.losses.perceptual.weights
        perceptual = PerceptualLoss(weights and Path(weights)).to(ranks.device)

    # Where to start: 1. a checkpoint of the run, 2. init.model, 3. init.encoder_weights, 4. random.
    folder = checkpoint.find(run)
    generator = engines.build_generator(run, fill=folder is None)
    discriminator = engines.build_discriminator(run)
    state = checkpoint.TrainState()
    if folder is not None:
        state = checkpoint.resume(folder, run, generator, discriminator)
    elif config.stage == 1 and config.init.model is None and config.run.calibration_images > 0:
        images = _training_batches(run, ranks, index, start=0)
        calibrate(generator, images, config.run.calibration_images, ranks.device)

    objective = Objective(
        config.losses, perceptual, discriminator and discriminator.module, engines.mean_over_ranks
    )
    batches = _training_batches(run, ranks, index, start=state.samples)
    if ranks.rank == 0:
        _record(run)
    return Setup(
        ranks, generator, discriminator, objective, perceptual, batches, validation_index, state
    )


def train(run: Run, setup: Setup) -> None:
    """The loop: from `setup.state` to the last step."""
    from vqrae_ds import checkpoint, engines
    from vqrae_ds.data.stream import evaluation_batches
    from vqrae_ds.evaluation.metrics import validate
    from vqrae_ds.losses.objective import discriminator_loss
    from vqrae_ds.monitor import Monitor

    config, (sizes, total_steps) = run.config, run.schedule
    ranks, generator, discriminator, objective, perceptual, batches, validation_index, state = setup
    monitor = Monitor(run, state.step)
    while state.step < total_steps:
        for _ in range(sizes.accumulation):
            images = next(batches).images_B3HW.to(ranks.device, non_blocking=True)
            loss = objective.generator(generator(images), images, state.step)
            generator.backward(loss.surrogate)
            generator.step()  # the optimizer's step comes with the last micro batch
            monitor.add(loss.terms)
            if objective.trains_discriminator(state.step):
                verdict = discriminator_loss(discriminator, images, loss.images_hat_B3HW)
                discriminator.backward(verdict.total)
                discriminator.step()
                monitor.add(verdict.terms)
        state = checkpoint.TrainState(state.step + 1, state.samples + sizes.global_batch)

        if is_due(state.step, config.monitor.log_every_steps, total_steps):
            simvq, rate = generator.module.vqrae.simvq, generator.get_lr()[0]
            entry = monitor.log(state.step, state.samples, rate, simvq)
            if not math.isfinite(entry["loss/total"]):  # the same number on every rank
                raise FloatingPointError(f"the loss is {entry['loss/total']} at step {state.step}")
        if validation_index is not None and is_due(
            state.step, config.monitor.validate_every_steps, total_steps
        ):
            held_out = evaluation_batches(
                validation_index,
                image_size=config.model.image_size,
                batch_size=sizes.micro_batch,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
            validation = validate(generator, held_out, perceptual, ranks.device)
            monitor.log_validation(state.step, validation)
        if is_due(state.step, config.checkpoint.every_steps, total_steps):
            checkpoint.save(run, generator, discriminator, state)
    monitor.close()
    logger.info("done: %d steps, %s", state.step, config.run.output_dir)
    engines.stop()


def is_due(step: int, every: int, total: int) -> bool:
    """Whether what happens every `every` steps, and after the last one, happens after `step`."""
    return step % every == 0 or step == total


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


def _configure_logging(rank: int) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("vqrae_ds").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # warns of what is meant to be


def _record(run: Run) -> None:
    """The run folder explains itself: both files as resolved, and what it runs on."""
    folder = Path(run.config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(), sort_keys=False))
    (folder / "deepspeed.json").write_text(json.dumps(run.deepspeed, indent=2) + "\n")
    packages = ("vqrae_ds", "torch", "deepspeed", "transformers", "numpy", "pillow", "webdataset")
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "ranks": run.schedule.batch.world_size,
        "packages": {package: version(package) for package in packages},
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


if __name__ == "__main__":
    main()
