"""The entry point and the one training loop, for both stages.

    deepspeed --module vqrae_ds.train --config Y.yaml --deepspeed_config J.json [a.b=value ...]

A step: next batch -> engine forward -> objective -> backward, step -> the discriminator's turn -> count. What is
due after it, in this order: log, validation, checkpoint. The same command again resumes.
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
from typing import TYPE_CHECKING

import yaml

from vqrae_ds.config import Run, describe, parse_command_line

if TYPE_CHECKING:
    import torch

    from vqrae_ds.data.stream import Batch
    from vqrae_ds.engines import Ranks
    from vqrae_ds.losses.perceptual import PerceptualLoss

logger = logging.getLogger("vqrae_ds.train")


def main() -> None:
    """Check the configuration, then train. A user's mistake is one line and exit status 2."""
    try:
        run, dry_run = parse_command_line()
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    if dry_run:
        sys.stdout.write(describe(run) + "\n")
        return
    train(run)


def train(run: Run) -> None:
    """Train `run` to its end, from its newest checkpoint if there is one."""
    # Imported here, so that a mistake in the configuration does not wait for torch.
    from vqrae_ds import checkpoint, engines
    from vqrae_ds.calibration import calibrate
    from vqrae_ds.data.index import read_index
    from vqrae_ds.data.stream import evaluation_batches
    from vqrae_ds.evaluation.metrics import validate
    from vqrae_ds.losses.objective import Objective, discriminator_loss
    from vqrae_ds.monitor import Monitor

    config, (sizes, total_steps) = run.config, run.schedule
    ranks = engines.start(timedelta(minutes=config.run.collective_timeout_minutes))
    _configure_logging(ranks.rank)
    if ranks.rank == 0:
        _record(run)

    # 1. A checkpoint of this run. 2. init.model. 3. init.encoder_weights. 4. Random.
    folder = checkpoint.find(run)
    generator = engines.build_generator(run, fill=folder is None)
    discriminator = engines.build_discriminator(run)
    perceptual = _build_perceptual(run, ranks.device)
    state = checkpoint.TrainState()
    if folder is not None:
        state = checkpoint.resume(folder, run, generator, discriminator)
    elif config.stage == 1 and config.init.model is None and config.run.calibration_images > 0:
        batches = _training_batches(run, ranks, start=0)
        calibrate(generator, batches, config.run.calibration_images, ranks.device)

    objective = Objective(
        config.losses, perceptual, discriminator and discriminator.module, engines.mean_over_ranks
    )
    validation_index = config.data.validation and read_index(Path(config.data.validation))
    batches = _training_batches(run, ranks, start=state.samples)
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
            learning_rate = generator.get_lr()[0]
            simvq = generator.module.vqrae.simvq
            entry = monitor.log(state.step, state.samples, learning_rate, simvq)
            if not math.isfinite(entry["loss/total"]):  # the same number on every rank
                raise FloatingPointError(f"the loss is {entry['loss/total']} at step {state.step}")
        if validation_index and is_due(
            state.step, config.monitor.validate_every_steps, total_steps
        ):
            batches_to_validate = evaluation_batches(
                validation_index,
                image_size=config.model.image_size,
                batch_size=sizes.micro_batch,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
            validation = validate(generator, batches_to_validate, perceptual, ranks.device)
            monitor.log_validation(state.step, validation)
        if is_due(state.step, config.checkpoint.every_steps, total_steps):
            checkpoint.save(run, generator, discriminator, state)
    monitor.close()
    logger.info("done: %d steps, %s", state.step, config.run.output_dir)
    engines.stop()


def is_due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every `every` steps, and after the last one, happens after `step`."""
    return step % every == 0 or step == total


def _training_batches(run: Run, ranks: Ranks, *, start: int) -> Iterator[Batch]:
    from vqrae_ds.data.decode import Augmentation
    from vqrae_ds.data.index import read_index
    from vqrae_ds.data.stream import training_batches

    data = run.config.data
    return training_batches(
        read_index(Path(data.train)),
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


def _build_perceptual(run: Run, device: torch.device) -> PerceptualLoss | None:
    from vqrae_ds.losses.perceptual import PerceptualLoss

    if run.config.losses.perceptual is None:
        return None
    weights = run.config.losses.perceptual.weights
    return PerceptualLoss(Path(weights) if weights else None).to(device)


def _configure_logging(rank: int) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("vqrae_ds").setLevel(logging.INFO if rank == 0 else logging.ERROR)


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
