"""From the command line to a checked run: reads both files, applies overrides, does the arithmetic.

Every mistake is a `ValueError` of one line with the key's full name, its value and the way out.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from vqrae_ds.config import deepspeed_json
from vqrae_ds.config.schema import TrainConfig, resolve_model

DEEPSPEED_PREFIX = "deepspeed."

EXAMPLE = """\
example:
  deepspeed --num_gpus 8 --module vqrae_ds.train \\
      --config ds_configs/internvit_6b/stage1.yaml --deepspeed_config ds_configs/stage1_zero3.json \\
      run.output_dir=runs/stage1 deepspeed.train_micro_batch_size_per_gpu=8

The same command again resumes from the newest checkpoint. --dry-run prints the resolved run and stops.
"""


class Schedule(NamedTuple):
    """The batch arithmetic and the length of the run in optimizer steps."""

    batch: deepspeed_json.BatchArithmetic
    total_steps: int


class Run(NamedTuple):
    """One checked run. `deepspeed` is the JSON for the generator engine with the derived numbers filled in."""

    config: TrainConfig
    deepspeed: dict[str, Any]
    schedule: Schedule


class CommandLine(NamedTuple):
    """What the command line said, with the run that it describes."""

    run: Run
    dry_run: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message} (--help shows an example)")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; here it is the number that everybody means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_command_line(argv: Sequence[str] | None = None) -> CommandLine:
    """Parse and check everything. Raises `ValueError` with one line on any mistake of the user's."""
    parser = _Parser(
        prog="vqrae_ds.train",
        description="Train a VQRAE tokenizer.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="model, stage, losses, data"
    )
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="JSON", help="batch, optimizer, ZeRO"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check and print the resolved run, then stop"
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="number of ranks assumed by --dry-run"
    )
    parser.add_argument(
        "--allow-untested-key",
        action="append",
        default=[],
        metavar="KEY",
        help="let this untested key of the DeepSpeed JSON through (may be repeated)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="deepspeed.a.b=value for the JSON"
    )
    args = parser.parse_intermixed_args(argv)
    if args.gpus is not None and (not args.dry_run or args.gpus < 1):
        raise ValueError(
            f"--gpus {args.gpus} needs --dry-run and a positive number; the launcher sets the real one"
        )
    world_size = args.gpus or int(os.environ.get("WORLD_SIZE", "1"))
    run = read_run(
        Path(args.config),
        Path(args.deepspeed_config),
        overrides=args.overrides,
        world_size=world_size,
        allowed_keys=args.allow_untested_key,
    )
    return CommandLine(run, args.dry_run)


def read_run(
    config_path: Path,
    deepspeed_path: Path,
    *,
    overrides: Sequence[str] = (),
    world_size: int = 1,
    allowed_keys: Sequence[str] = (),
) -> Run:
    """Read, override and check a run for `world_size` ranks. Raises `ValueError` with one line."""
    raw_yaml = _read(config_path, lambda text: yaml.load(text, Loader=_Loader), yaml.YAMLError)
    raw_json = _read(deepspeed_path, _json_without_duplicates, json.JSONDecodeError)
    for override in overrides:
        _apply(raw_yaml, raw_json, override)
    deepspeed_json.check_keys(raw_json, allowed_keys)
    config = _validate(raw_yaml)
    config = config.model_copy(update={"model": resolve_model(config.model)})
    _check_paths(config)
    _check_same_model(config)
    schedule = _schedule(config, raw_json, world_size)
    return Run(config, _complete(raw_json, schedule), schedule)


def describe(run: Run) -> str:
    """The resolved run as YAML and JSON, and the arithmetic in words."""
    batch, steps = run.schedule.batch, run.schedule.total_steps
    length = f"run.total_steps = {steps:,}"
    if run.config.run.epochs is not None:
        samples = run.config.data.samples_per_epoch
        length = f"{run.config.run.epochs} epochs x {samples:,} samples = {steps:,} steps"
    return "\n".join(
        [
            yaml.safe_dump(run.config.model_dump(), sort_keys=False).rstrip(),
            json.dumps(run.deepspeed, indent=2),
            f"batch:  {batch.global_batch} = {batch.micro_batch} micro x {batch.accumulation} accumulated "
            f"x {batch.world_size} ranks",
            f"length: {length}, {steps * batch.global_batch:,} images",
        ]
    )


def _read(path: Path, parse: Any, error_class: type[Exception]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        content = parse(path.read_text())
    except (error_class, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, not {type(content).__name__}")
    return content


def _json_without_duplicates(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"the DeepSpeed JSON gives the key {key} twice")
        return dict(items)

    return json.loads(text, object_pairs_hook=pairs)


def _apply(raw_yaml: dict, raw_json: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise ValueError(f"override {override!r} is not of the form a.b=value")
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
        target[last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML") from error


def _validate(raw: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        # The most telling mistake first: a misspelt key often makes another one "missing".
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ValueError(_one_line(errors[0]) + more) from error


def _one_line(error: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{name} = {error['input']!r} is not a known key; {_nearest(name)}"
    if error["type"] == "missing":
        return f"{name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _nearest(name: str) -> str:
    """The way out of an unknown key: a near name here, the same name elsewhere, or the other file."""
    parent, _, key = name.rpartition(".")
    names = list(_names(TrainConfig, ""))
    siblings = [n.rpartition(".")[2] for n in names if n.rpartition(".")[0] == parent]
    if near := difflib.get_close_matches(key, siblings, n=1, cutoff=0.6):
        return f"did you mean {f'{parent}.' if parent else ''}{near[0]}?"
    if same := [n for n in names if n.rpartition(".")[2] == key]:
        return f"did you mean {same[0]}?"
    deepspeed_keys = [*deepspeed_json.tested_names(), *deepspeed_json.OWNED_ELSEWHERE]
    if key in (n.rpartition(".")[2] for n in deepspeed_keys):
        return "it belongs in the DeepSpeed JSON"
    near = difflib.get_close_matches(key, [n.rpartition(".")[2] for n in names], n=1, cutoff=0.75)
    if near:
        return f"did you mean {next(n for n in names if n.rpartition('.')[2] == near[0])}?"
    return f"known here: {', '.join(siblings)}"


def _names(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in section.model_fields.items():
        yield prefix + key
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for annotation in inner:
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from _names(annotation, f"{prefix}{key}.")


def _check_paths(config: TrainConfig) -> None:
    perceptual = config.losses.perceptual
    paths = {
        "data.train": (config.data.train, "tools/make_shards.py writes such a folder"),
        "data.validation": (config.data.validation, "tools/make_shards.py writes such a folder"),
        "init.model": (
            config.init.model,
            "tools/convert_checkpoint.py --to stage2 writes such a folder",
        ),
        "init.encoder_weights": (
            config.init.encoder_weights,
            "a folder with config.json and safetensors",
        ),
        "losses.perceptual.weights": (
            perceptual.weights if perceptual else None,
            "tools/make_lpips_weights.py writes such a file",
        ),
    }
    for name, (path, hint) in paths.items():
        if path is not None and not Path(path).exists():
            raise ValueError(f"{name}: {path} does not exist ({hint})")


def _check_same_model(config: TrainConfig) -> None:
    """Weights of another architecture are refused here, not after hours in the queue."""
    if config.init.model is None:
        return
    path = Path(config.init.model) / "config.json"
    if not path.is_file():
        raise ValueError(f"init.model: {path} does not exist")
    theirs, ours = json.loads(path.read_text()), config.model.model_dump()
    for key in ours:
        if key in theirs and theirs[key] != ours[key]:
            raise ValueError(f"model.{key} = {ours[key]!r} differs from {theirs[key]!r} in {path}")


def _schedule(config: TrainConfig, raw_json: Mapping[str, Any], world_size: int) -> Schedule:
    batch = deepspeed_json.batch_arithmetic(raw_json, world_size)
    steps = config.run.total_steps
    if steps is None:
        steps = config.run.epochs * config.data.samples_per_epoch // batch.global_batch
    warmup = deepspeed_json.get(raw_json, "scheduler.params.warmup_num_steps") or 0
    if steps <= warmup:
        raise ValueError(
            f"scheduler.params.warmup_num_steps = {warmup} is not below the {steps} steps of the run "
            "(run.epochs x data.samples_per_epoch / train_batch_size, or run.total_steps)"
        )
    return Schedule(batch, steps)


def _complete(raw_json: Mapping[str, Any], schedule: Schedule) -> dict[str, Any]:
    """The JSON with the numbers that are derived, for DeepSpeed and for the record."""
    complete = json.loads(json.dumps(raw_json))
    complete["gradient_accumulation_steps"] = schedule.batch.accumulation
    if "scheduler" in complete:
        complete["scheduler"].setdefault("params", {})["total_num_steps"] = schedule.total_steps
    return complete
