"""Checks of the DeepSpeed JSON, and the batch arithmetic that follows from it.

DeepSpeed accepts a misspelt top-level key in silence (a misspelt `zero_optimization` trains at stage 0) and
reads "auto" as a default. So every key must be one that this project has tested, with the type it expects;
an untested key is refused unless it is allowed by name on the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

NUMBER = (int, float)

# Leaf -> accepted types; a tuple of strings means one of them.
TESTED_KEYS: dict[str, Any] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_clipping": NUMBER,
    "zero_allow_untested_optimizer": bool,
    "optimizer": {
        "type": ("AdamW", "SGD"),
        "params": {
            "lr": NUMBER,
            "betas": list,
            "eps": NUMBER,
            "weight_decay": NUMBER,
            "torch_adam": bool,
            "momentum": NUMBER,
        },
    },
    "scheduler": {
        "type": ("WarmupCosineLR",),
        "params": {
            "warmup_num_steps": int,
            "warmup_min_ratio": NUMBER,
            "warmup_type": ("linear", "log"),
            "cos_min_ratio": NUMBER,
        },
    },
    "bf16": {"enabled": bool},
    "zero_optimization": {
        "stage": int,
        "overlap_comm": bool,
        "contiguous_gradients": bool,
        "reduce_bucket_size": NUMBER,
        "sub_group_size": NUMBER,
        "stage3_prefetch_bucket_size": NUMBER,
        "stage3_param_persistence_threshold": NUMBER,
        "stage3_max_live_parameters": NUMBER,
        "stage3_max_reuse_distance": NUMBER,
    },
}
REQUIRED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_clipping",  # an absent one means 1.0 to DeepSpeed, not "off"
    "optimizer.type",
    "optimizer.params.lr",
    "zero_optimization.stage",
)
# Numbers that the YAML, or the arithmetic, owns; a JSON that gives them too is refused.
OWNED_ELSEWHERE = {
    "gradient_accumulation_steps": "it is derived: train_batch_size / (micro batch x ranks)",
    "scheduler.params.total_num_steps": "the length of the run is run.epochs or run.total_steps in the YAML",
    "steps_per_print": "it is monitor.log_every_steps in the YAML",
    "seed": "it is run.seed in the YAML",
    "tensorboard": "TensorBoard is always written; its interval is monitor.log_every_steps in the YAML",
    "checkpoint": "checkpoints are described by the section checkpoint of the YAML",
}


class BatchArithmetic(NamedTuple):
    """Samples: `global_batch` = `micro_batch` x `accumulation` x `world_size`."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


def check_keys(raw: Any, allowed: Collection[str] = ()) -> None:
    """Check every key and type of the DeepSpeed JSON; `allowed` names untested keys to let through.

    Raises `ValueError` with the full name of the first offending key, its value and the nearest tested name.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"the DeepSpeed JSON must be an object, not {type(raw).__name__}")
    _check_section(raw, TESTED_KEYS, "", frozenset(allowed))
    for name in REQUIRED_KEYS:
        if get(raw, name) is None:
            raise ValueError(f"{name} is missing")
    if get(raw, "zero_optimization.stage") not in (0, 1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage = {get(raw, 'zero_optimization.stage')!r} is not 0, 1, 2 or 3"
        )
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "optimizer.params.lr"):
        if get(raw, name) <= 0:
            raise ValueError(f"{name} = {get(raw, name)!r} is not positive")


def batch_arithmetic(deepspeed: Mapping[str, Any], world_size: int) -> BatchArithmetic:
    """The global batch is fixed; how often gradients are accumulated follows from the number of ranks."""
    total, micro = deepspeed["train_batch_size"], deepspeed["train_micro_batch_size_per_gpu"]
    accumulation, rest = divmod(total, micro * world_size)
    if rest or accumulation == 0:
        possible = [n for n in range(1, total // micro + 1) if total % (micro * n) == 0]
        nearest = sorted(possible, key=lambda n: abs(n - world_size))[:4]
        raise ValueError(
            f"train_batch_size = {total} is not a multiple of "
            f"train_micro_batch_size_per_gpu x ranks = {micro} x {world_size}; "
            + (
                f"with this micro batch it can run on {', '.join(map(str, sorted(nearest)))} ranks"
                if nearest
                else "the micro batch does not divide it on any number of ranks"
            )
        )
    return BatchArithmetic(total, micro, accumulation, world_size)


def get(section: Mapping[str, Any], dotted: str) -> Any:
    """The value at `dotted`, or None where the path ends early."""
    value: Any = section
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def tested_names() -> list[str]:
    """All tested keys by their full dotted names, sections included."""
    return list(_walk(TESTED_KEYS, ""))


def _walk(keys: Mapping[str, Any], prefix: str):
    for key, expected in keys.items():
        yield prefix + key
        if isinstance(expected, dict):
            yield from _walk(expected, f"{prefix}{key}.")


def _check_section(raw: Mapping, tested: Mapping[str, Any], prefix: str, allowed: frozenset[str]):
    for key, value in raw.items():
        name = prefix + key
        if name in allowed:
            continue
        if name in OWNED_ELSEWHERE:
            raise ValueError(
                f"{name} = {value!r} does not belong in the DeepSpeed JSON: {OWNED_ELSEWHERE[name]}"
            )
        if key not in tested:
            raise ValueError(
                f"{name} = {value!r} is not a key tested with this trainer; {_way_out(name, key, tested)}"
            )
        _check_value(name, value, tested[key], allowed)


def _check_value(name: str, value: Any, expected: Any, allowed: frozenset[str]) -> None:
    if value == "auto":
        raise ValueError(
            f"{name} = 'auto' has no meaning outside the Hugging Face Trainer: give the value"
        )
    if isinstance(expected, dict):
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{name} = {value!r} must be a section {{...}} with the keys {', '.join(expected)}"
            )
        _check_section(value, expected, f"{name}.", allowed)
    elif isinstance(expected, tuple) and isinstance(expected[0], str):
        if value not in expected:
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(expected)}")
    elif not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        wanted = {int: "a whole number", bool: "true or false", list: "a list", NUMBER: "a number"}[
            expected
        ]
        raise ValueError(f"{name} = {value!r} must be {wanted}")


def _way_out(name: str, key: str, tested: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, tested, n=1, cutoff=0.6)
    if near:
        return f"did you mean {name[: len(name) - len(key)]}{near[0]}? (--allow-untested-key {name} lets it through)"
    elsewhere = [full for full in tested_names() if full.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"--allow-untested-key {name} lets it through"
