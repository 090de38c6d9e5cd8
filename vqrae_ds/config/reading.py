"""Model YAML + DeepSpeed JSON + overrides -> one checked run.

Every mistake is a `ValueError` of one line with the key's full name, its value and the way out.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vqrae_ds.config import deepspeed_json
from vqrae_ds.config.checking import check, key_names, list_keys, nearest_name, show
from vqrae_ds.config.cross_checks import check_starts, check_together
from vqrae_ds.config.data_paths import data_folders
from vqrae_ds.config.files import BASE, Recipe, parse_value, read_json, read_recipe
from vqrae_ds.config.model import ModelConfig, resolve_model
from vqrae_ds.config.schema import TrainConfig
from vqrae_ds.manifest import find_step_folder

DEEPSPEED_PREFIX = "deepspeed."
NOT_WEIGHTS = {"model.commitment_cost", "model.legacy", "model.ema_decay"}  # may change by stage

YAML_NAMES = key_names(TrainConfig)
# `enabled` or `type` alone does not say that a key belongs in the DeepSpeed JSON.
TELLING_JSON_NAMES = [
    n for n in deepspeed_json.tested_names() if not n.endswith((".enabled", ".type", ".params"))
]


class Schedule(NamedTuple):
    """The batch arithmetic and the length of the run in optimizer steps."""

    batch: deepspeed_json.BatchArithmetic
    total_steps: int


class Run(NamedTuple):
    """One checked run. `deepspeed` is the generator engine's JSON with the derived numbers."""

    config: TrainConfig
    deepspeed: dict[str, Any]
    schedule: Schedule

    @property
    def bf16(self) -> bool:
        """Whether the weights are in bfloat16."""
        return bool(deepspeed_json.get(self.deepspeed, "bf16.enabled"))


def read_run(
    config_path: Path,
    deepspeed_path: Path,
    *,
    overrides: Sequence[str] = (),
    world_size: int = 1,
    allowed_keys: Sequence[str] = (),
    check_paths: bool = True,
) -> Run:
    """Read, override and check a run for `world_size` ranks. Raises `ValueError` with one line.

    Without `check_paths` data and weights need not be there; the encoder's `config.json` must be.
    """
    recipe = read_recipe(config_path, "--config")
    raw_yaml = copy.deepcopy(recipe.values)
    raw_json = read_json(deepspeed_path, "--deepspeed_config")
    for override in overrides:
        _apply(raw_yaml, raw_json, override)
    deepspeed_json.check_keys(raw_json, allowed_keys, YAML_NAMES)
    try:
        config = check(
            TrainConfig, raw_yaml, source="the YAML", describe_unknown=_describe_unknown_in_yaml
        )
        config = config.model_copy(update={"model": resolve_model(config.model)})
        if check_paths:
            resumes = _has_checkpoint(config)
            _check_paths(config, resumes)
            if not resumes:
                _check_first_weights(config)
        check_together(config, raw_json, world_size)
        schedule = _schedule(config, raw_json, world_size)
    except ValueError as error:
        raise ValueError(f"{error}{_place_in_base(str(error), raw_yaml, recipe)}") from error
    return Run(config, _complete(raw_json, schedule), schedule)


def describe(run: Run) -> str:
    """The resolved run as YAML and JSON, and the arithmetic in words."""
    batch, steps = run.schedule.batch, run.schedule.total_steps
    length = f"run.total_steps = {steps:,}"
    if run.config.run.epochs is not None:
        epochs, samples = run.config.run.epochs, run.config.data.samples_per_epoch
        length = f"{epochs} epochs x {samples:,} samples / {batch.global_batch} = {steps:,} steps"
    return "\n".join(
        [
            yaml.safe_dump(run.config.model_dump(), sort_keys=False).rstrip(),
            json.dumps(run.deepspeed, indent=2),
            f"batch:  {batch.in_words()}",
            f"length: {length}, {steps * batch.global_batch:,} images",
        ]
    )


def _apply(raw_yaml: dict[str, Any], raw_json: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")) or name.split() != [name]:
        raise ValueError(f"override {override!r} is not of the form a.b=value, without spaces")
    if not text:
        raise ValueError(f"override {override!r} has no value; null switches a section off")
    target, path = raw_yaml, name
    if name.startswith(DEEPSPEED_PREFIX):
        target, path = raw_json, name.removeprefix(DEEPSPEED_PREFIX)
    *sections, last = path.split(".")
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ValueError(f"override {override!r}: {section} is not a section")
    try:
        target[last] = parse_value(text)
    except ValueError as error:
        raise ValueError(f"override {override!r}: {error}") from error


def _place_in_base(message: str, raw_yaml: Mapping[str, Any], recipe: Recipe) -> str:
    """Says so where the value that `message` begins with stands in the recipe's base."""
    name = message.partition(" ")[0]
    value = deepspeed_json.get(recipe.base_values, name)
    if value is None or value != deepspeed_json.get(raw_yaml, name):
        return ""
    return f" ({name} stands in {recipe.base_path})"


def _describe_unknown_in_yaml(name: str) -> str:
    section, _, key = name.rpartition(".")
    if name == BASE:
        return "is no override: it is a key of the YAML file itself"
    if owner := deepspeed_json.OWNED_ELSEWHERE.get(key):
        return f"is not a key of the YAML: {owner}"
    near = nearest_name(name, YAML_NAMES, TELLING_JSON_NAMES)
    if near in YAML_NAMES:
        return f"is not a key of the YAML; did you mean {near}?"
    if near:
        return (
            f"is not a key of the YAML; it belongs in the DeepSpeed JSON as {near} "
            f"({DEEPSPEED_PREFIX}{near}=... on the command line)"
        )
    return f"is not a key of the YAML; known: {list_keys(section, YAML_NAMES)}"


def _check_paths(config: TrainConfig, resumes: bool) -> None:
    shards = "a folder that tools/make_shards.py wrote"
    folders = (
        *((name, path, shards) for name, path in data_folders(config.data).items()),
        ("init.from_run", config.init.from_run, "the folder of a run or of a checkpoint"),
        ("init.model", config.init.model, "a folder of tools/convert_checkpoint.py --to stage2"),
        ("init.encoder_weights", config.init.encoder_weights, "a folder with safetensors"),
    )
    problems = []
    for name, path, kind in folders:
        if name.startswith("init.") and resumes:
            continue
        if path is not None and not os.path.isdir(path):
            problem = "is not" if os.path.exists(path) else "does not exist; it must be"
            problems.append(f"{name} = {show(path)} {problem} {kind}")
    files = (
        ("perceptual", config.losses.perceptual, "tools/make_lpips_weights.py writes one"),
        ("convnext", config.losses.convnext, "it is torchvision's convnext_small-0c510722.pth"),
    )
    for name, term, way_out in files:
        if term and term.weights and not os.path.isfile(term.weights):
            path = show(term.weights)
            problems.append(f"losses.{name}.weights = {path} is not a file; {way_out}")
    if problems:
        raise ValueError(" | ".join(problems))
    if os.path.exists(config.run.output_dir) and not os.path.isdir(config.run.output_dir):
        raise ValueError(f"run.output_dir = {show(config.run.output_dir)} is not a folder")


def _has_checkpoint(config: TrainConfig) -> bool:
    """A run that resumes needs the folders of its first weights no more."""
    return any(Path(config.run.output_dir).glob("checkpoints/step_*/manifest.json"))


def check_same_model(ours: ModelConfig, path: Path, name: str) -> None:
    """Raise `ValueError` where the model in the file `path`, of the setting `name`, is another."""
    theirs = check(ModelConfig, read_json(path, name), prefix=f"{name}: {path}: ")
    here, there = (dict(_leaves(m.model_dump(), "model")) for m in (ours, theirs))
    for key in here | there:
        if key not in NOT_WEIGHTS and here.get(key) != there.get(key):
            raise ValueError(
                f"{key} = {show(here.get(key))} differs from {show(there.get(key))} in {path}: "
                f"{name} holds the weights of another model"
            )


def _check_first_weights(config: TrainConfig) -> None:
    """Weights of another architecture are refused here, not after hours in the queue."""
    if config.init.from_run is not None:
        try:
            folder = find_step_folder(Path(config.init.from_run))
        except ValueError as error:
            raise ValueError(f"init.from_run: {error}") from error
        check_same_model(config.model, folder / "model_config.json", "init.from_run")
    if config.init.model is not None:
        check_same_model(config.model, Path(config.init.model) / "config.json", "init.model")
    if config.init.encoder_weights is not None:
        path = Path(config.init.encoder_weights) / "config.json"
        if path.is_file():  # else the folder has the weights alone
            _check_same_encoder(config, path)


def _check_same_encoder(config: TrainConfig, path: Path) -> None:
    """Shapes do not tell one version of an encoder from another with more blocks or another eps."""
    ours, theirs = config.model.encoder_config, read_json(path, "init.encoder_weights")
    for key in ours:
        if key in theirs and key != "initializer_range" and _side(ours[key]) != _side(theirs[key]):
            raise ValueError(
                f"{key} = {show(ours[key])} of the encoder differs from {show(theirs[key])} in "
                f"{path}: init.encoder_weights is not the encoder of model.encoder_config_path"
            )


def _side(value: Any) -> Any:
    """Hugging Face writes a side as a number or as [height, width]."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}")


def _schedule(config: TrainConfig, raw_json: Mapping[str, Any], world_size: int) -> Schedule:
    batch = deepspeed_json.batch_arithmetic(raw_json, world_size)
    steps = config.run.total_steps
    if steps is None:
        samples = config.run.epochs * config.data.samples_per_epoch
        steps = samples // batch.global_batch
        if steps == 0:
            raise ValueError(
                f"run.epochs = {config.run.epochs} x data.samples_per_epoch = "
                f"{config.data.samples_per_epoch} is less than train_batch_size = "
                f"{batch.global_batch}: not one step"
            )
    warmup = deepspeed_json.get(raw_json, "scheduler.params.warmup_num_steps")
    if warmup is not None and warmup >= steps:
        raise ValueError(
            f"scheduler.params.warmup_num_steps = {warmup} is not below the {steps} steps of the "
            "run (run.total_steps, or run.epochs x data.samples_per_epoch / train_batch_size): set "
            "deepspeed.scheduler.params.warmup_num_steps"
        )
    check_starts(config.losses, steps, warmup or 0)
    return Schedule(batch, steps)


def _complete(raw_json: Mapping[str, Any], schedule: Schedule) -> dict[str, Any]:
    """A copy of the JSON with the numbers that are derived, for DeepSpeed and for the record."""
    complete = copy.deepcopy(dict(raw_json))
    complete["gradient_accumulation_steps"] = schedule.batch.accumulation
    if "scheduler" in complete:
        complete["scheduler"]["params"]["total_num_steps"] = schedule.total_steps
    return complete
