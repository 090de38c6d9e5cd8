"""What the DeepSpeed JSON may say, and the batch arithmetic that follows from it.

DeepSpeed accepts a misspelt top-level key in silence (a misspelt `zero_optimization` trains at
stage 0) and reads "auto" as a default. So every key must be one that this project has tested, with
a value that DeepSpeed takes; an untested key is refused unless the command line allows it by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from vqrae_ds.config.checking import check, key_names, nearest_multiples, nearest_name, show
from vqrae_ds.config.deepspeed_schema import DeepSpeedJson

# Numbers that the YAML or the arithmetic owns.
OWNED_ELSEWHERE = {
    "gradient_accumulation_steps": "it is derived: train_batch_size / (micro batch x ranks)",
    "scheduler.params.total_num_steps": "the length is run.epochs or run.total_steps in the YAML",
    "steps_per_print": "it is monitor.log_every_steps in the YAML",
    "seed": "it is run.seed in the YAML",
    "tensorboard": "it is always written, every monitor.log_every_steps of the YAML",
    "checkpoint": "checkpoints are the section checkpoint of the YAML",
}
# Of the discriminator's engine. DeepSpeed's own bucket, 5e8 elements, is for a hundred times more
# parameters than it has, and would take 2 GB.
DISCRIMINATOR_ZERO = {"stage": 1, "reduce_bucket_size": 5_000_000}


class BatchArithmetic(NamedTuple):
    """Samples: `global_batch` = `micro_batch` x `accumulation` x `data_size`.

    `world_size` ranks are `data_size` tensor-parallel groups, each of `tensor_size` ranks that see
    the same images.
    """

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int
    tensor_size: int = 1

    @property
    def data_size(self) -> int:
        """Number of ranks, or groups of ranks, that see different images."""
        return self.world_size // self.tensor_size

    def in_words(self) -> str:
        """The multiplication, as it is shown."""
        return (
            f"{self.global_batch} = {self.micro_batch} micro x {self.accumulation} accumulated x "
            f"{self.data_size} {_ranks(self.tensor_size)}"
        )


def check_keys(
    raw: Mapping[str, Any], allowed: Collection[str] = (), yaml_names: Sequence[str] = ()
) -> None:
    """Check every key and value of the DeepSpeed JSON; `allowed` are untested keys to let through.

    Raises `ValueError` with the full name of the offending key, its value and the nearest tested
    name, or the one of `yaml_names`.
    """
    for name, owner in OWNED_ELSEWHERE.items():
        if (value := get(raw, name)) is not None:
            raise ValueError(f"{name} = {show(value)} must not be in the DeepSpeed JSON: {owner}")

    def describe_untested(name: str) -> str:
        near = nearest_name(name, tested_names(), yaml_names)
        in_yaml = " in the YAML" if near in yaml_names else ""
        start = "is an untested key of the DeepSpeed JSON;"
        way_out = f"--allow-untested-key {name} lets it through"
        if near is None:
            return f"{start} {way_out}"
        return f"{start} did you mean {near}{in_yaml}? ({way_out})"

    check(
        DeepSpeedJson,
        _without(raw, allowed),
        source="the DeepSpeed JSON",
        describe_unknown=describe_untested,
    )


def tested_names() -> list[str]:
    """All tested keys by their full dotted names, sections included."""
    return key_names(DeepSpeedJson)


def batch_arithmetic(deepspeed: Mapping[str, Any], world_size: int) -> BatchArithmetic:
    """The global batch is fixed; how often gradients are accumulated follows from the ranks.

    Raises `ValueError` with the nearest numbers that would do where it is not a whole number.
    """
    total, micro = deepspeed["train_batch_size"], deepspeed["train_micro_batch_size_per_gpu"]
    micro_batches, rest = divmod(total, micro)
    if rest:
        raise ValueError(
            f"train_batch_size = {total} is not a multiple of train_micro_batch_size_per_gpu = "
            f"{micro}; nearest: {nearest_multiples(total, micro, 'and')}"
        )
    tensor_size = get(deepspeed, "tensor_parallel.autotp_size") or 1
    data_size, rest = divmod(world_size, tensor_size)
    if rest:
        raise ValueError(
            f"tensor_parallel.autotp_size = {tensor_size} does not divide the {world_size} ranks; "
            f"these do: {list_divisors(world_size, tensor_size)}"
        )
    accumulation, rest = divmod(micro_batches, data_size)
    if rest:
        possible = sorted(_divisors(micro_batches), key=lambda n: abs(n - data_size))[:4]
        raise ValueError(
            f"train_batch_size = {total} is not a multiple of train_micro_batch_size_per_gpu x "
            f"{_ranks(tensor_size)} = {micro} x {data_size}; with this micro batch it can run on "
            f"{', '.join(map(str, sorted(possible)))} {_ranks(tensor_size)}"
        )
    return BatchArithmetic(total, micro, accumulation, world_size, tensor_size)


def for_engine(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what the trainer does itself.

    DeepSpeed's own tensor parallelism begins with a model that is whole on every rank.
    """
    copied = copy.deepcopy(dict(deepspeed))
    copied.pop("tensor_parallel", None)
    return copied


def for_discriminator(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """A copy as the discriminator's engine has it: ZeRO-1, its state always in fp32.

    It is so small that masters and sums of gradients in bf16 would save nothing.
    """
    copied = for_engine(deepspeed) | {"zero_optimization": dict(DISCRIMINATOR_ZERO)}
    if get(deepspeed, "bf16.enabled"):
        copied["bf16"] = {"enabled": True}
        copied["data_types"] = {"grad_accum_dtype": "fp32"}
    return copied


def list_divisors(number: int, near: int) -> str:
    """The divisors of `number` that are nearest to `near`, for a sentence."""
    nearest = sorted(_divisors(number), key=lambda n: abs(n - near))[:4]
    return ", ".join(map(str, sorted(nearest)))


def _ranks(tensor_size: int) -> str:
    """What data are divided among."""
    return "ranks" if tensor_size == 1 else f"groups of {tensor_size} ranks"


def get(section: Mapping[str, Any], name: str) -> Any:
    """The value at the dotted `name`, or None where the path ends early."""
    value: Any = section
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _without(raw: Mapping[str, Any], allowed: Collection[str]) -> dict[str, Any]:
    """A copy without the allowed keys, each of which must be there and be untested."""
    rest, untested = copy.deepcopy(dict(raw)), _untested_names(raw)
    for name in allowed:
        if name not in untested:
            raise ValueError(
                f"--allow-untested-key {name} names no untested key of the DeepSpeed JSON; "
                f"it has {', '.join(untested) or 'none'}"
            )
        parent, _, key = name.rpartition(".")
        section = get(rest, parent) if parent else rest
        del section[key]
    return rest


def _untested_names(raw: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Full names of the untested keys; what is inside one goes with it."""
    names, tested = [], tested_names()
    for key, value in raw.items():
        if prefix + key not in tested and "." not in key:
            names.append(prefix + key)
        elif isinstance(value, Mapping):
            names += _untested_names(value, f"{prefix}{key}.")
    return names


def _divisors(number: int) -> set[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return {*small, *(number // n for n in small)}
