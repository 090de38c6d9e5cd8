"""The runs whose MFU is measured: a recipe's own files with fewer blocks, and made-up inputs.

Width, image size, losses, optimizer, ZeRO, checkpointing and the size of a micro batch are the
recipe's. What differs: depth, random first weights, photographs in shards made here, and that every
loss takes part from the first step on, the GAN too. The learning rate warms up in one step.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqrae_ds.benchmarks.photo_shards import source_jpegs, write_shard
from vqrae_ds.config import ModelConfig, Run, read_run
from vqrae_ds.conversion.output_folder import check_space
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.planning import RESERVE, fits, plan
from vqrae_ds.planning.states import GB

SOURCE_PX = 512
SHARDS, SAMPLES_A_SHARD = 8, 64
CALIBRATION_IMAGES = 16
# Standard deviation of first weights. The published files have 1e-10, for weights that are loaded:
# features drawn with it would be rounding errors.
INITIALIZER_RANGE = 0.02


class Recipe(NamedTuple):
    """The two files of a run, and the user's overrides of both."""

    config: Path
    deepspeed_config: Path
    overrides: Sequence[str] = ()


class Depth(NamedTuple):
    """Blocks of the encoder and of the decoder; None are as many as fit."""

    encoder: int | None = None
    decoder: int | None = None


def write_run(
    folder: Path, recipe: Recipe, depth: Depth, accumulation: int, steps: int, photos: Path
) -> Run:
    """A run of one rank: `steps` optimizer steps of `accumulation` micro batches each.

    All that it reads and writes is in `folder`. Blocks of `depth` are numbers. Raises `ValueError`
    where the recipe does not hold together.
    """
    run = read_recipe(recipe, depth)
    encoder, shards, initial = (folder / name for name in ("encoder", "shards", "initial"))
    _write_inputs(encoder, shards, run, photos)
    changes = {
        "run.output_dir": folder / "run",
        "run.epochs": "null",
        "run.total_steps": steps,
        "run.calibration_images": CALIBRATION_IMAGES,
        "run.profile_steps": "null",
        "model.encoder_config": "null",
        "model.encoder_config_path": encoder,
        "init.from_run": "null",
        "init.model": "null" if run.config.stage == 1 else initial,
        "init.encoder_weights": "null",
        "init.allow_untrained_encoder": "true" if run.config.stage == 1 else "false",
        "data.train": shards,
        "data.validation": "null",
        "data.streaming": "null",
        "data.samples_per_epoch": "null",
        "checkpoint.every_steps": steps,
        "checkpoint.keep_every": "null",
        "checkpoint.local_dir": "null",
        "monitor.log_every_steps": steps,
        "deepspeed.train_batch_size": run.schedule.batch.micro_batch * accumulation,
    }
    if "scheduler" in run.deepspeed:
        changes["deepspeed.scheduler.params.warmup_num_steps"] = 1
    changes |= dict.fromkeys(_later_starts(run.config.losses.model_dump(), "losses"), 0)
    overrides = [f"{key}={value}" for key, value in changes.items()]
    if run.config.stage == 2:
        _save_random(read_recipe(recipe, depth, overrides).config.model, initial)
    return read_recipe(recipe, depth, overrides, check_paths=True)


def _save_random(model: ModelConfig, folder: Path) -> None:
    """A folder of drawn weights, in fp32: stage 2 starts from nothing else."""
    vqrae = VQRAE(config=model)
    check_space(folder, 4 * sum(parameter.numel() for parameter in vqrae.parameters()))
    vqrae.save_pretrained(folder)


def _write_inputs(encoder: Path, shards: Path, run: Run, photos: Path) -> None:
    """The encoder's `config.json`, and photographs."""
    encoder.mkdir(parents=True)
    shape = {**run.config.model.encoder_config, "initializer_range": INITIALIZER_RANGE}
    (encoder / "config.json").write_text(json.dumps(shape))
    jpegs = itertools.cycle(source_jpegs(photos, SOURCE_PX))
    for number in range(SHARDS):
        write_shard(shards / f"{number:05d}.tar", list(itertools.islice(jpegs, SAMPLES_A_SHARD)))
    index_shards(shards)


def read_recipe(
    recipe: Recipe, depth: Depth, overrides: Sequence[str] = (), *, check_paths: bool = False
) -> Run:
    """The recipe with that depth, for one rank; None leaves a depth as it is."""
    changes = {"model.feature_layer": depth.encoder, "model.decoder.num_layers": depth.decoder}
    own = [f"{key}={value}" for key, value in changes.items() if value is not None]
    return read_run(
        recipe.config,
        recipe.deepspeed_config,
        overrides=[*recipe.overrides, *own, *overrides],
        check_paths=check_paths,
    )


def choose_depth(recipe: Recipe, given: Depth, memory: float) -> Depth:
    """The most blocks that the plan says fit into `memory` GB; what is `given` stays.

    Both parts get as many, unless the recipe has fewer of one. Where all is given nothing is
    planned. Raises `ValueError` where not even a block of each fits.
    """
    if None not in given:
        return given
    model = read_recipe(recipe, Depth()).config.model
    most = Depth(model.feature_layer, model.decoder.num_layers)

    def depth_of(number: int) -> Depth:
        wanted = zip(given, most, strict=True)
        return Depth(*(min(number, limit) if own is None else own for own, limit in wanted))

    def is_too_deep(number: int) -> bool:
        return not fits(plan(read_recipe(recipe, depth_of(number))), 1, memory)

    numbers = range(
        1, max(limit for own, limit in zip(given, most, strict=True) if own is None) + 1
    )
    number = bisect.bisect_left(numbers, True, key=is_too_deep)
    if number == 0:
        least = depth_of(1)
        raise ValueError(
            f"{least.encoder} and {least.decoder} blocks of encoder and decoder and a reserve of "
            f"{RESERVE / GB:g} GB do not fit into {memory:.1f} GB: lower "
            "deepspeed.train_micro_batch_size_per_gpu"
        )
    return depth_of(number)


def _later_starts(section: Mapping[str, Any], name: str) -> Iterator[str]:
    """Names of the keys by which a term takes part later than in the first step."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _later_starts(value, f"{name}.{key}")
        elif key.endswith("start_step") and value:
            yield f"{name}.{key}"
